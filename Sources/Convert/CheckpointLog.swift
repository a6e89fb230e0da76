import DiskImage
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// What a conversion has safely written so far: an append-only file of 64-byte records, little-endian, each protected
/// by a CRC, after a header of the same size that binds it to its source and target. A torn last record is ignored.
///
/// Records are appended after the image bytes they speak of are on stable storage, never before. One conversion at a
/// time: the file is locked while open.
final class CheckpointLog: Sendable {
    static let recordSize = 64
    private static let magic: UInt64 = 0x3250_4B43_4154_4C46  // "FLTACKP2"

    private enum Kind: UInt32 {
        case chunk = 1, source = 2, finished = 3
        /// Cluster sizes of the compressed chunk whose record follows.
        case sizes = 4
    }

    private static let sizesPerRecord = 28
    private static let sizeRecordsPerChunk = (Chunk.clusters + sizesPerRecord - 1) / sizesPerRecord

    /// Which conversion a log belongs to.
    struct Binding: Equatable {
        let target: TargetFormat
        let capacity: UInt64
        /// SHA-256 over everything else: region, formats, chunk size, and each source file's identity.
        let digest: [UInt8]

        init(target: TargetFormat, capacity: UInt64, digest: [UInt8]) {
            self.target = target
            self.capacity = capacity
            self.digest = digest
        }

        /// - Parameters:
        ///   - identity: of the source's content; nil for a stream, which is like no other.
        ///   - volume: what is written instead of a file.
        init(
            region: FileRegion, format: DiskFormat, capacity: UInt64, identity: [String]?, target: TargetFormat,
            volume: (any Volume)?, options: DiskConversion.Options
        ) {
            let digest = Digest()
            func add(_ text: String) { digest.update(Array(text.utf8) + [0]) }
            add("\(region.path)")
            add("\(region.offset) \(region.length.map(String.init) ?? "-") \(format.rawValue) \(capacity)")
            add("\(target.rawValue) \(Chunk.size) \(options.checksum.rawValue)")
            add(options.compression?.description ?? "-")
            add("\(options.geometry.clusterSize)")
            if let volume { add("volume \(volume.name) \(volume.size)") }
            for line in identity ?? ["stream \(UInt64.random(in: 0 ... .max)) \(UInt64.random(in: 0 ... .max))"] {
                add(line)
            }
            self.init(target: target, capacity: capacity, digest: digest.finalize())
        }
    }

    struct ChunkRecord: Sendable, Equatable {
        let placement: ChunkPlacement
        /// `ChunkScan.finish` of the chunk as the guest sees it.
        let digest: [UInt8]
    }

    /// The image is complete and synced; what remains is to publish it.
    struct Finished: Equatable {
        let inode: UInt64
        /// Bytes. With the inode it tells the image; the device's number may change over a reboot.
        let imageSize: UInt64
        let sourceBytes: UInt64
        let sourceSHA256: [UInt8]?
        let contentDigest: [UInt8]?

        init(image: FileIdentity, sourceBytes: UInt64, sourceSHA256: [UInt8]?, contentDigest: [UInt8]?) {
            self.init(
                inode: image.inode, imageSize: image.size, sourceBytes: sourceBytes, sourceSHA256: sourceSHA256,
                contentDigest: contentDigest)
        }

        fileprivate init(
            inode: UInt64, imageSize: UInt64, sourceBytes: UInt64, sourceSHA256: [UInt8]?, contentDigest: [UInt8]?
        ) {
            self.inode = inode
            self.imageSize = imageSize
            self.sourceBytes = sourceBytes
            self.sourceSHA256 = sourceSHA256
            self.contentDigest = contentDigest
        }

        func isImage(_ identity: FileIdentity) -> Bool { identity.inode == inode && identity.size == imageSize }
    }

    struct Contents {
        let binding: Binding
        var hasChunks = false
        var finished: Finished?
    }

    private struct State {
        /// Where the next record goes.
        var end: UInt64 = 0
        var isUnreadable = false
        /// Of a chunk that occurs again the later record counts.
        var index = RecordIndex()
    }

    private let file: File
    private let state = Mutex(State())

    init(_ path: String) throws {
        file = try File(path, O_RDWR | O_CREAT)
        guard flock(file.descriptor, LOCK_EX | LOCK_NB) == 0 else {
            throw MigrationError(
                .unavailable, "\(path): another conversion is working on this disk",
                hint: "wait for it or stop it")
        }
    }

    /// Ends this conversion's claim. Not left to closing: a thread about to end may hold the file a little longer.
    func unlock() { _ = flock(file.descriptor, LOCK_UN) }

    /// Whether `read` found bytes that no run of this program version wrote.
    var isUnreadable: Bool { state.withLock { $0.isUnreadable } }

    /// nil for a new log and for one without a valid header. Throws the flag's reason soon after it is set: the log of
    /// a compressed disk of 8 TiB takes about ten seconds.
    func read(stop: StopFlag = StopFlag()) throws -> Contents? {
        try state.withLock { state in
            let size = try file.size
            state.isUnreadable = size > 0
            guard let header = try record(at: 0, size), header.span.bytes.word(0) == Self.magic else { return nil }
            let formatNumber = header.littleEndian(12)
            let targets = TargetFormat.allCases
            guard formatNumber < targets.count else { return nil }
            var contents = Contents(
                binding: Binding(
                    target: targets[Int(formatNumber)], capacity: header.span.bytes.word(16),
                    digest: Array(header[32..<64])))
            state.isUnreadable = false
            state.end = UInt64(Self.recordSize)
            state.index = RecordIndex()
            let total = Chunk.total(capacity: min(contents.binding.capacity, Chunk.maximumCapacity))
            var source: (bytes: UInt64, digest: [UInt8]?)?
            // Behind the last complete record; a chunk's begins with its sizes.
            var start = state.end
            defer { state.end = start }
            while let bytes = try record(at: state.end, size) {
                try stop.check()
                let (first, second, third) = (
                    bytes.span.bytes.word(8), bytes.span.bytes.word(16), bytes.span.bytes.word(24)
                )
                let digest = Array(bytes[32..<64])
                switch Kind(rawValue: bytes.littleEndian(0)) {
                case .chunk:
                    let count = (state.end - start) / UInt64(Self.recordSize)
                    if first < total, count <= Self.sizeRecordsPerChunk {
                        state.index.set(first, position: start / UInt64(Self.recordSize), isConfirmed: false)
                        contents.hasChunks = true
                    }
                    start = state.end + UInt64(Self.recordSize)
                case .sizes: break
                case .source:
                    source = (first, second == 1 ? digest : nil)
                    start = state.end + UInt64(Self.recordSize)
                case .finished:
                    start = state.end + UInt64(Self.recordSize)
                    contents.finished = source.map {
                        Finished(
                            inode: first, imageSize: second, sourceBytes: $0.bytes, sourceSHA256: $0.digest,
                            contentDigest: third == 0 ? digest : nil)
                    }
                case nil: return contents
                }
                state.end += UInt64(Self.recordSize)
            }
            return contents
        }
    }

    // MARK: Chunks

    /// The latest record of a chunk: what `read` found, or what was appended. nil when there is none, or one that was
    /// forgotten.
    func record(of chunk: UInt64) throws -> ChunkRecord? {
        try state.withLock { $0.index.position(of: chunk) }.map { try record(atPosition: $0) }
    }

    /// After `read`: lets `accept` judge the records whose chunks have a place in the image, the latest first; those it
    /// refuses are forgotten.
    func adopt(_ accept: (ChunkPlacement) throws -> Bool) throws {
        for position in state.withLock({ $0.index.newestFirst() }) {
            let placement = try record(atPosition: UInt64(position)).placement
            if placement.bitmap != 0, try !accept(placement) { forget(placement.index) }
        }
    }

    /// The image was found to hold what the chunk's record says.
    func confirm(_ chunk: UInt64) { state.withLock { $0.index.confirm(chunk) } }

    func forget(_ chunk: UInt64) { state.withLock { $0.index.remove(chunk) } }

    /// What was confirmed or appended since `read` or `start`.
    var placements: some ChunkPlacements { Placements(log: self) }

    private struct Placements: ChunkPlacements {
        let log: CheckpointLog

        func forEach(_ body: (ChunkPlacement) throws -> Void) throws {
            try log.state.withLock { $0.index }.forEachConfirmed {
                let placement = try log.record(atPosition: $0).placement
                if placement.bitmap != 0 { try body(placement) }
            }
        }
    }

    /// The record that begins with its first cluster sizes at a position, which comes from the index.
    private func record(atPosition position: UInt64) throws -> ChunkRecord {
        var sizes: [UInt16] = []
        let end = state.withLock { $0.end }
        for offset in 0...UInt64(Self.sizeRecordsPerChunk) {
            guard let bytes = try record(at: (position + offset) * UInt64(Self.recordSize), end) else { break }
            switch Kind(rawValue: bytes.littleEndian(0)) {
            case .sizes:
                for index in 0..<Self.sizesPerRecord {
                    sizes.append(UInt16(bytes[8 + index * 2]) | UInt16(bytes[9 + index * 2]) << 8)
                }
            case .chunk:
                let words = bytes.span.bytes
                let bitmap = words.word(24)
                let placement = ChunkPlacement(
                    index: words.word(8), hostOffset: words.word(16), bitmap: bitmap,
                    sizes: Array(sizes.prefix(bitmap.nonzeroBitCount)))
                return ChunkRecord(placement: placement, digest: Array(bytes[32..<64]))
            default: break
            }
        }
        throw MigrationError(
            .dataLoss, "\(file.path): record \(position) changed while it was in use",
            hint: "run the same command again: it checks what it finds")
    }

    /// After `read`: removes what follows the last complete record.
    func cutTornTail() throws {
        try state.withLock { try file.truncate(to: $0.end) }
    }

    /// Empties the log and writes a new header.
    func start(_ binding: Binding) throws {
        try state.withLock { state in
            try file.truncate(to: 0)
            var header = [UInt8](repeating: 0, count: Self.recordSize)
            header.store(Self.magic, 0)
            header.store(UInt32(TargetFormat.allCases.firstIndex(of: binding.target) ?? 0), 12)
            header.store(binding.capacity, 16)
            header.replaceSubrange(32..<64, with: binding.digest)
            try file.write(seal(header, crcAt: 8), at: 0)
            try file.synchronize()
            try Files.synchronizeDirectory(of: file.path)
            state.end = UInt64(Self.recordSize)
            state.index = RecordIndex()
        }
    }

    /// Each chunk counts as confirmed.
    func append(_ records: [ChunkRecord]) throws {
        var bytes: [UInt8] = []
        var places: [Int] = []
        for chunk in records {
            let placement = chunk.placement
            places.append(bytes.count)
            bytes += sizeRecords(placement.sizes)
            bytes += record(.chunk, placement.index, placement.hostOffset, placement.bitmap, chunk.digest)
        }
        let start = try append(bytes)
        state.withLock { state in
            for (chunk, place) in zip(records, places) {
                let position = (start + UInt64(place)) / UInt64(Self.recordSize)
                state.index.set(chunk.placement.index, position: position, isConfirmed: true)
            }
        }
    }

    func append(_ finished: Finished) throws {
        let source = record(
            .source, finished.sourceBytes, finished.sourceSHA256 == nil ? 0 : 1, 0,
            finished.sourceSHA256 ?? [UInt8](repeating: 0, count: 32))
        let end = record(
            .finished, finished.inode, finished.imageSize, finished.contentDigest == nil ? 1 : 0,
            finished.contentDigest ?? [UInt8](repeating: 0, count: 32))
        _ = try append(source + end)
    }

    /// Returns where it went.
    private func append(_ bytes: [UInt8]) throws -> UInt64 {
        try state.withLock { state in
            try file.write(bytes, at: state.end)
            try file.synchronizeData()
            defer { state.end += UInt64(bytes.count) }
            return state.end
        }
    }

    /// kind · CRC · three numbers · digest
    private func record(_ kind: Kind, _ a: UInt64, _ b: UInt64, _ c: UInt64, _ digest: [UInt8]) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Self.recordSize)
        bytes.store(kind.rawValue, 0)
        bytes.store(a, 8)
        bytes.store(b, 16)
        bytes.store(c, 24)
        bytes.replaceSubrange(32..<64, with: digest)
        return seal(bytes, crcAt: 4)
    }

    private func sizeRecords(_ sizes: [UInt16]) -> [UInt8] {
        var records: [UInt8] = []
        for start in stride(from: 0, to: sizes.count, by: Self.sizesPerRecord) {
            var bytes = [UInt8](repeating: 0, count: Self.recordSize)
            bytes.store(Kind.sizes.rawValue, 0)
            for (index, size) in sizes[start...].prefix(Self.sizesPerRecord).enumerated() {
                bytes.store(size, 8 + index * 2)
            }
            records += seal(bytes, crcAt: 4)
        }
        return records
    }

    private func seal(_ bytes: [UInt8], crcAt offset: Int) -> [UInt8] {
        var bytes = bytes
        bytes.store(bytes.withUnsafeBytes { crc32($0) }, offset)
        return bytes
    }

    /// The record at `offset` if it is whole and its CRC is right.
    private func record(at offset: UInt64, _ size: UInt64) throws -> [UInt8]? {
        guard offset + UInt64(Self.recordSize) <= size else { return nil }
        let bytes = try file.readExactly(at: offset, count: Self.recordSize)
        let place = offset == 0 ? 8 : 4
        var unsealed = bytes
        unsealed.store(0 as UInt32, place)
        return unsealed.withUnsafeBytes { crc32($0) } == bytes.littleEndian(place) ? bytes : nil
    }
}

extension RawSpan {
    fileprivate func word(_ offset: Int) -> UInt64 {
        UInt64(littleEndian: unsafeLoadUnaligned(fromByteOffset: offset, as: UInt64.self))
    }
}

extension [UInt8] {
    fileprivate func littleEndian(_ offset: Int) -> UInt32 {
        UInt32(littleEndian: span.bytes.unsafeLoadUnaligned(fromByteOffset: offset, as: UInt32.self))
    }

    fileprivate mutating func store<Integer: FixedWidthInteger & BitwiseCopyable>(_ value: Integer, _ offset: Int) {
        withUnsafeMutableBytes { $0.storeBytes(of: value.littleEndian, toByteOffset: offset, as: Integer.self) }
    }
}
