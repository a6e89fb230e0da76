package import DiskImage
import Glibc
package import HostKit

/// The first guest byte in which two disks differ, whatever formats they have; nil when they hold the same. A disk that
/// is longer than the other and zero from there on is the same. Reads only what isn't a hole in both.
package func firstDifference(
    _ first: any DiskSource, _ second: any DiskSource, stop: StopFlag = StopFlag(),
    progress: (UInt64) -> Void = { _ in }
) throws -> UInt64? {
    let sides = try [Side(first), Side(second)]
    let capacity = max(first.capacity, second.capacity)
    var position: UInt64 = 0
    while position < capacity {
        try stop.check()
        guard let data = try sides.compactMap({ try $0.nextData(from: position) }).min() else { return nil }
        let chunk = Chunk(index: data / UInt64(Chunk.size), capacity: capacity)
        for side in sides { try side.read(chunk) }
        if let byte = mismatch(sides[0].bytes(chunk.count), sides[1].bytes(chunk.count)) {
            return chunk.offset + UInt64(byte)
        }
        position = chunk.offset + UInt64(chunk.count)
        progress(position)
    }
    return nil
}

private final class Side {
    private let reader: any DiskReader
    private let capacity: UInt64
    private let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)

    init(_ disk: any DiskSource) throws {
        reader = try disk.makeReader()
        capacity = disk.capacity
    }

    deinit { buffer.deallocate() }

    func nextData(from offset: UInt64) throws -> UInt64? {
        offset < capacity ? try reader.nextData(from: offset) : nil
    }

    /// Fills the chunk; zeros behind the end of the disk.
    func read(_ chunk: Chunk) throws {
        let count = capacity > chunk.offset ? Int(min(UInt64(chunk.count), capacity - chunk.offset)) : 0
        let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<count])
        let isData = count > 0 ? try reader.read(at: chunk.offset, into: part) == .data : false
        let zeros = UnsafeMutableRawBufferPointer(rebasing: buffer[(isData ? count : 0)..<chunk.count])
        if let base = zeros.baseAddress { memset(base, 0, zeros.count) }
    }

    func bytes(_ count: Int) -> UnsafeRawBufferPointer { UnsafeRawBufferPointer(rebasing: buffer[..<count]) }
}

/// The first byte in which two buffers of one size differ.
private func mismatch(_ a: UnsafeRawBufferPointer, _ b: UnsafeRawBufferPointer) -> Int? {
    guard let left = a.baseAddress, let right = b.baseAddress, memcmp(left, right, a.count) != 0 else { return nil }
    return a.indices.first { a[$0] != b[$0] }
}
