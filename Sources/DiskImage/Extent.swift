import Glibc
import MigrationModel

/// A run of guest sectors kept in one place. Immutable; each thread makes its own reader.
protocol Extent: Sendable {
    /// Bytes.
    var capacity: UInt64 { get }
    func makeReader() throws -> sending any ExtentReader
}

/// As `DiskReader`, with offsets that count from the start of the extent.
protocol ExtentReader: AnyObject {
    func nextData(from offset: UInt64) throws -> UInt64?
    /// Returns false when the range is known to be zero; the buffer's content is then unspecified.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> Bool
    /// Puts what this extent, of a delta, has over what the parent's had there.
    func overlay(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws
}

extension ExtentReader {
    /// Extents other than sparse ones hold every sector.
    func overlay(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
        if try !read(at: offset, into: buffer) { zero(buffer) }
    }
}

/// Sectors that read as zero and are kept nowhere.
struct ZeroExtent: Extent {
    let capacity: UInt64

    func makeReader() -> sending any ExtentReader { Reader() }

    private final class Reader: ExtentReader {
        func nextData(from offset: UInt64) -> UInt64? { nil }
        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) -> Bool { false }
    }
}

/// A disk made of extents laid end to end.
struct ExtentDisk: DiskSource {
    let formatName: String
    let files: [SourceFile]
    let capacity: UInt64
    private let extents: [any Extent]
    /// Guest address of each extent's first byte, ascending.
    private let starts: [UInt64]

    init(_ extents: [any Extent], formatName: String, files: [SourceFile], name: String) throws {
        var starts: [UInt64] = []
        var total: UInt64 = 0
        for extent in extents {
            starts.append(total)
            // No overflow: every extent was limited to 1 PiB and the sum is checked each time.
            total += extent.capacity
            guard total <= Chunk.maximumCapacity else { throw tooLarge(name, "\(total) bytes") }
        }
        guard total > 0 else { throw MigrationError.malformed(name, "the disk has no capacity") }
        self.extents = extents
        self.starts = starts
        self.formatName = formatName
        self.files = files
        capacity = total
    }

    func makeReader() -> sending any DiskReader { Reader(self) }

    func makeLayerReader() -> Reader { Reader(self) }

    func makeForwardReader(_ stream: any ByteSource) throws -> VMDK.ForwardReader? {
        guard extents.count == 1, let extent = extents[0] as? VMDK.SparseExtent else { return nil }
        return try extent.makeForwardReader(stream)
    }

    /// Keeps only the extent in use open: a disk of 2 GiB extents may have more of them than a process has descriptors.
    final class Reader: DiskReader {
        private let disk: ExtentDisk
        private var current: (index: Int, reader: any ExtentReader)?

        init(_ disk: ExtentDisk) { self.disk = disk }

        private func reader(_ index: Int) throws -> any ExtentReader {
            if let current, current.index == index { return current.reader }
            current = nil
            let reader = try disk.extents[index].makeReader()
            current = (index, reader)
            return reader
        }

        /// The extent that holds `offset`, which lies within the capacity.
        private func index(of offset: UInt64) -> Int {
            var low = 0
            var high = disk.starts.count - 1
            while low < high {
                let middle = (low + high + 1) / 2
                if disk.starts[middle] <= offset { low = middle } else { high = middle - 1 }
            }
            return low
        }

        func nextData(from offset: UInt64) throws -> UInt64? {
            guard offset < disk.capacity else { return nil }
            var position = offset
            for index in index(of: offset)..<disk.extents.count {
                let start = disk.starts[index]
                if let found = try reader(index).nextData(from: position - start) { return start + found }
                position = start + disk.extents[index].capacity
            }
            return nil
        }

        /// As `ExtentReader.overlay`, over the part of the range that the disk has.
        func overlay(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
            var done = 0
            while done < buffer.count, offset + UInt64(done) < disk.capacity {
                let position = offset + UInt64(done)
                let index = index(of: position)
                let end = disk.starts[index] + disk.extents[index].capacity
                let count = Int(min(UInt64(buffer.count - done), end - position))
                try reader(index).overlay(
                    at: position - disk.starts[index],
                    into: UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count]))
                done += count
            }
        }

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> ChunkContent {
            var done = 0
            var hasData = false
            while done < buffer.count {
                let position = offset + UInt64(done)
                let index = index(of: position)
                let end = disk.starts[index] + disk.extents[index].capacity
                let count = Int(min(UInt64(buffer.count - done), end - position))
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count])
                if try reader(index).read(at: position - disk.starts[index], into: part) {
                    // Holes before the first data were left as they were.
                    if !hasData { zero(UnsafeMutableRawBufferPointer(rebasing: buffer[..<done])) }
                    hasData = true
                } else if hasData {
                    zero(part)
                }
                done += count
            }
            return hasData ? .data : .zero
        }
    }
}

func zero(_ buffer: UnsafeMutableRawBufferPointer) {
    if let base = buffer.baseAddress { memset(base, 0, buffer.count) }
}

func tooLarge(_ name: String, _ claim: String) -> MigrationError {
    MigrationError(
        .outOfRange, "\(name): claims \(claim); disks may have up to \(Chunk.maximumCapacity) bytes",
        hint: "the header is damaged, or this is not a disk image")
}
