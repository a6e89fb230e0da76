package import DiskImage
package import HostKit

/// A digest of what the guest sees, the same for every image format and however sparse the image is.
///
/// A tree of SHA-256: of blocks of 64 KiB (the disk's last one may be shorter), of the 64 block digests of each chunk
/// of 4 MiB, of all chunk digests; always the digests' 32 bytes one after the other. In Python, over a raw image:
///
///     import hashlib, sys
///     sha256 = lambda data: hashlib.sha256(data).digest()
///     total = hashlib.sha256()
///     with open(sys.argv[1], "rb") as disk:
///         while chunk := disk.read(4 << 20):
///             total.update(sha256(b"".join(sha256(chunk[at:at + 65536]) for at in range(0, len(chunk), 65536))))
///     print(total.hexdigest())
///
/// Blocks and chunks of zeros have digests known beforehand, so computing it costs as much as the data, not as the
/// capacity; and blocks don't wait for each other.
package struct ContentDigest {
    private let total = Digest()
    private let capacity: UInt64
    private let zeroChunk: [UInt8]
    /// Many of them, to feed long holes with few calls.
    private let zeroRun: [UInt8]
    private var next: UInt64 = 0

    private static let zeroChunkDigest = ChunkDigest.ofZeros(Chunk.size)

    package init(capacity: UInt64) {
        self.capacity = capacity
        zeroChunk = ContentDigest.zeroChunkDigest
        zeroRun = [UInt8](repeatElement(zeroChunk, count: 2048).joined())
    }

    /// Reads a whole disk and returns its digest in hex. Blocks; one thread, one chunk of memory.
    package static func compute(_ disk: any DiskSource, stop: StopFlag = StopFlag()) throws -> String {
        let reader = try disk.makeReader()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
        defer { buffer.deallocate() }
        var content = ContentDigest(capacity: disk.capacity)
        var position: UInt64 = 0
        while position < disk.capacity, let data = try reader.nextData(from: position) {
            try stop.check()
            let chunk = Chunk(index: data / UInt64(Chunk.size), capacity: disk.capacity)
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count])
            if try reader.read(at: chunk.offset, into: part) == .data {
                content.add(ChunkDigest.of(UnsafeRawBufferPointer(part)), chunk: chunk.index)
            }
            position = chunk.offset + UInt64(chunk.count)
        }
        return hex(content.finalize())
    }

    /// Adds the digest of chunk `index`; indices ascend, those left out are zero chunks.
    package mutating func add(_ digest: [UInt8], chunk index: UInt64) {
        addZeros(until: index)
        total.update(digest)
        next = index + 1
    }

    package mutating func finalize() -> [UInt8] {
        addZeros(until: Chunk.total(capacity: capacity))
        return total.finalize()
    }

    private mutating func addZeros(until index: UInt64) {
        while next < index {
            let last = Chunk(index: index - 1, capacity: capacity)
            // Only the disk's last chunk can be short.
            let whole = last.count == Chunk.size ? index - next : index - next - 1
            if whole == 0 {
                total.update(ChunkDigest.ofZeros(last.count))
                next += 1
            } else if whole >= 2048 {
                total.update(zeroRun)
                next += 2048
            } else {
                total.update(zeroChunk)
                next += 1
            }
        }
    }
}
