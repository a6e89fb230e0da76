import MigrationModel

extension VMDK {
    /// Reads a streamOptimized disk strictly front to back: from a pipe, a download, or a file. Memory doesn't grow
    /// with the disk's data. Every marker is checked, and so is that the grain tables agree with what was seen: beside
    /// the stream when the source is a file, at the end of it otherwise. One thread at a time.
    package final class ForwardReader {
        /// The stream isn't in guest order, or has grains its tables don't know. Thrown only where tables were given:
        /// through them the disk can still be read.
        package struct NotSequential: Error {}

        private static let markerSize = 12
        private static let readSize = 256 << 10
        /// 64 TiB with 64 KiB grains; the directory is held in memory.
        private static let maximumDirectory: UInt64 = 2 << 20

        private let source: any ByteSource
        private let header: Header
        /// A file's own tables.
        private var tables: GrainTables?
        /// What takes their place in a stream.
        private var census: GrainCensus?
        private let grainCount: UInt64
        /// Bytes read and not yet consumed, before the next block takes them over.
        private var carry: [UInt8] = []
        /// Offset in the stream of the first unconsumed byte.
        private var position: UInt64 = 0
        private var lastGrain: UInt64?
        private var isAtEnd = false

        package var capacity: UInt64 { header.capacity * sectorSize }
        package var name: String { source.name }
        var grainSize: Int { header.grainSize }

        /// Reads the header and the descriptor of a stream without tables at hand. Only whole disks pass.
        package init(_ source: any ByteSource) throws {
            self.source = source
            let start = try Self.take(Header.size, from: source)
            guard VMDK.isHostedSparse(start) else {
                if !VMDK.isDescriptor(start) { try VMDK.refuseForeign(start, name: source.name) }
                throw MigrationError(
                    .invalidArgument, "\(source.name): not a streamOptimized VMDK",
                    hint: "other formats can't be read front to back: give the file's path")
            }
            header = try Header(parsing: start.span.bytes, name: source.name)
            guard header.isCompressed else {
                throw MigrationError(
                    .invalidArgument, "\(source.name): a sparse VMDK that isn't streamOptimized",
                    hint: "it can't be read front to back: give the file's path")
            }
            guard header.directoryCount <= Self.maximumDirectory else {
                throw tooLarge(source.name, "\(header.capacity) sectors in grains of \(header.grainSectors)")
            }
            grainCount = (header.capacity + header.grainSectors - 1) / header.grainSectors
            position = UInt64(Header.size)
            var census = GrainCensus(header, name: source.name)
            try readDescriptor()
            if header.grainDirectory != Header.directoryAtEnd {
                try readTables(into: &census)
            }
            self.census = census
            try skip(toSector: max(header.overhead, position / sectorSize), "the first grain")
        }

        /// Follows a file whose header, footer and directory were validated on opening.
        init(_ source: any ByteSource, _ extent: SparseExtent, _ tables: GrainTables) throws {
            self.source = source
            header = extent.header
            self.tables = tables
            grainCount = (header.capacity + header.grainSectors - 1) / header.grainSectors
            guard let first = try self.tables?.nextStored(from: 0, limit: grainCount) else {
                isAtEnd = true
                return
            }
            if case .sector(let sector)? = try self.tables?.entry(first) {
                try skip(toSector: sector, "the first grain")
            }
        }

        /// Memory that holds any chunk's grains.
        package func makeBlock() -> GrainBlock {
            let record = (Self.markerSize + GrainStream.maximumCompressed(grainSize) + 511) / 512 * 512
            return GrainBlock(
                capacity: Chunk.size / grainSize * record + record + Self.readSize, grainSize: grainSize, name: name)
        }

        /// Reads the grains of the next chunk that has any. Returns false when the stream is over and its tables were
        /// found right.
        package func next(_ block: GrainBlock) throws -> Bool {
            block.grains.removeAll(keepingCapacity: true)
            if isAtEnd { return false }
            var cursor = Cursor(block.memory, carry)
            carry = []
            defer { if !isAtEnd { carry = cursor.rest } }
            while true {
                guard try fill(&cursor, Self.markerSize) else {
                    try endWithoutMarker(cursor)
                    return !block.grains.isEmpty
                }
                let sector = UInt64(littleEndian: cursor.load(0))
                let size = Int(UInt32(littleEndian: cursor.load(8)))
                if size == 0 {
                    if try takeMetadata(sector, &cursor) { continue }
                    return !block.grains.isEmpty
                }
                let grain = try check(sector, size)
                let index = sector * sectorSize / UInt64(Chunk.size)
                if !block.grains.isEmpty && index != block.index { return true }
                try follow(grain)
                guard try fill(&cursor, Self.markerSize + size) else {
                    throw MigrationError.truncated(
                        name, "grain \(grain) ends behind byte \(position + UInt64(cursor.available))")
                }
                block.index = index
                let data = cursor.start + Self.markerSize..<cursor.start + Self.markerSize + size
                block.grains.append(
                    GrainBlock.Grain(offset: Int(sector * sectorSize - index * UInt64(Chunk.size)), data: data))
                lastGrain = grain
                let padded = (Self.markerSize + size + 511) / 512 * 512
                _ = try fill(&cursor, padded)
                consume(min(padded, cursor.available), &cursor)
            }
        }

        /// Reads what is left, for its digest.
        package func drain() throws {
            isAtEnd = true
            carry = []
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Self.readSize, alignment: 4096)
            defer { buffer.deallocate() }
            while true {
                let count = try source.read(into: buffer)
                if count == 0 { return }
                position += UInt64(count)
                let part = UnsafeRawBufferPointer(rebasing: buffer[..<count])
                if tables == nil && !isZero(part) {
                    throw MigrationError.damaged(name, "it goes on behind its end-of-stream marker")
                }
            }
        }

        // MARK: Grains

        private func check(_ sector: UInt64, _ size: Int) throws -> UInt64 {
            guard sector < header.capacity, sector % header.grainSectors == 0 else {
                throw MigrationError.damaged(
                    name, "the marker at byte \(position) is for sector \(sector) of \(header.capacity)")
            }
            guard size <= GrainStream.maximumCompressed(grainSize) else {
                throw MigrationError.damaged(name, "the grain at byte \(position) claims \(size) compressed bytes")
            }
            let grain = sector / header.grainSectors
            if let lastGrain, grain <= lastGrain {
                if tables != nil { throw NotSequential() }
                throw MigrationError(
                    .failedPrecondition, "\(name): grain \(grain) at byte \(position) follows grain \(lastGrain)",
                    hint: "its grains aren't in order: save it to a file and convert that")
            }
            return grain
        }

        /// The next grain is where the tables say, and they know none before it.
        private func follow(_ grain: UInt64) throws {
            census?.add(grain, sector: position / sectorSize)
            guard tables != nil else { return }
            let expected = try tables?.nextStored(from: lastGrain.map { $0 + 1 } ?? 0, limit: grainCount)
            guard expected == grain, case .sector(position / sectorSize)? = try tables?.entry(grain) else {
                throw NotSequential()
            }
        }

        private func requireNoMore() throws {
            if try tables?.nextStored(from: lastGrain.map { $0 + 1 } ?? 0, limit: grainCount) != nil {
                throw NotSequential()
            }
        }

        // MARK: Metadata

        /// A marker of another kind. Returns false at the end of the stream.
        private func takeMetadata(_ sectors: UInt64, _ cursor: inout Cursor) throws -> Bool {
            guard try fill(&cursor, Int(sectorSize)) else {
                throw MigrationError.truncated(name, "a marker at byte \(position) is cut off")
            }
            let type = UInt32(littleEndian: cursor.load(12))
            if type == 0 {
                // The end, or a sector of padding before it.
                try end(&cursor)
                return false
            }
            guard type <= 3, sectors <= Self.maximumDirectory * 4 / sectorSize + 1 else {
                throw MigrationError.damaged(
                    name, "the marker at byte \(position) is of kind \(type), \(sectors) sectors")
            }
            consume(Int(sectorSize), &cursor)
            let place = position
            if type == 2 {
                var directory: [UInt8] = []
                directory.reserveCapacity(Int(sectors * sectorSize))
                for _ in 0..<sectors { directory += try takeSector(&cursor) }
                try census?.take(directory: directory, sector: place / sectorSize)
            } else if type == 1 {
                var table: [UInt8] = []
                for _ in 0..<min(sectors, 4) { table += try takeSector(&cursor) }
                census?.take(table: table, sector: place / sectorSize)
                for _ in 4..<max(sectors, 4) { _ = try takeSector(&cursor) }
            } else {
                for index in 0..<sectors {
                    let sector = try takeSector(&cursor)
                    if index == 0 { try census?.take(footer: sector) }
                }
            }
            return true
        }

        private func takeSector(_ cursor: inout Cursor) throws -> [UInt8] {
            guard try fill(&cursor, Int(sectorSize)) else {
                throw MigrationError.truncated(name, "its tables end at byte \(position)")
            }
            defer { consume(Int(sectorSize), &cursor) }
            return Array(UnsafeRawBufferPointer(rebasing: cursor.memory[cursor.start..<cursor.start + Int(sectorSize)]))
        }

        private func end(_ cursor: inout Cursor) throws {
            try requireNoMore()
            try census?.finish()
            guard tables != nil || isZero(cursor.unconsumed) else {
                throw MigrationError.damaged(name, "it goes on behind its end-of-stream marker")
            }
            try drain()
        }

        /// Some writers (QEMU), with tables in front, just stop.
        private func endWithoutMarker(_ cursor: Cursor) throws {
            guard isZero(cursor.unconsumed) else {
                throw MigrationError.truncated(name, "the marker at byte \(position) is cut off")
            }
            try requireNoMore()
            guard header.grainDirectory != Header.directoryAtEnd || tables != nil else {
                throw MigrationError.truncated(
                    name, "the stream ends at byte \(position) without its footer and end-of-stream marker")
            }
            try census?.finish()
            isAtEnd = true
        }

        // MARK: Before the first grain

        private func readDescriptor() throws {
            guard let place = header.descriptor else { return }
            try skip(toSector: place.sector, "the embedded descriptor")
            let text = try take(Int(place.sectors * sectorSize))
            let descriptor = try Descriptor(parsing: text, name: "\(name) (embedded descriptor)")
            try descriptor.requireWholeDisk(name: name)
        }

        private func readTables(into census: inout GrainCensus) throws {
            try skip(toSector: header.grainDirectory, "the grain directory")
            let directory = try take(Int((header.directoryCount * 4 + 511) / 512 * 512))
            try census.take(directory: directory, sector: header.grainDirectory)
            for sector in census.tableSectors {
                try skip(toSector: sector, "a grain table")
                census.take(table: try take(Header.entriesPerTable * 4), sector: sector)
            }
        }

        private func take(_ count: Int) throws -> [UInt8] {
            defer { position += UInt64(count) }
            return try Self.take(count, from: source)
        }

        private static func take(_ count: Int, from source: any ByteSource) throws -> [UInt8] {
            try [UInt8](unsafeUninitializedCapacity: count) { buffer, done in
                while done < count {
                    let rest = UnsafeMutableRawBufferPointer(rebasing: UnsafeMutableRawBufferPointer(buffer)[done...])
                    let got = try source.read(into: rest)
                    guard got > 0 else {
                        throw MigrationError.truncated(
                            source.name, "it ended in its header and tables", missing: UInt64(count - done))
                    }
                    done += got
                }
            }
        }

        private func skip(toSector sector: UInt64, _ what: String) throws {
            guard sector <= Chunk.maximumCapacity / sectorSize, sector * sectorSize >= position else {
                throw MigrationError.malformed(name, "\(what) at sector \(sector) can't be where the header says")
            }
            let place = sector * sectorSize
            while position < place { _ = try take(Int(min(place - position, UInt64(Self.readSize)))) }
        }

        // MARK: Bytes

        /// Makes `count` unconsumed bytes available. Returns false when the stream ends before.
        private func fill(_ cursor: inout Cursor, _ count: Int) throws -> Bool {
            while cursor.available < count {
                let room = cursor.memory[cursor.end...].prefix(Self.readSize)
                guard !room.isEmpty else {
                    throw MigrationError.damaged(name, "more grains at byte \(position) than a chunk can have")
                }
                let got = try source.read(into: UnsafeMutableRawBufferPointer(rebasing: room))
                if got == 0 { return false }
                cursor.end += got
            }
            return true
        }

        private func consume(_ count: Int, _ cursor: inout Cursor) {
            cursor.start += count
            position += UInt64(count)
        }
    }

    /// What of a block's memory was read and what was consumed.
    private struct Cursor {
        let memory: UnsafeMutableRawBufferPointer
        var start = 0
        var end: Int

        init(_ memory: UnsafeMutableRawBufferPointer, _ carry: [UInt8]) {
            self.memory = memory
            memory.copyBytes(from: carry)
            end = carry.count
        }

        var available: Int { end - start }
        var unconsumed: UnsafeRawBufferPointer { UnsafeRawBufferPointer(rebasing: memory[start..<end]) }
        var rest: [UInt8] { Array(unconsumed) }

        func load<Integer: FixedWidthInteger & BitwiseCopyable>(_ offset: Int) -> Integer {
            memory.loadUnaligned(fromByteOffset: start + offset, as: Integer.self)
        }
    }
}
