import DiskImage
import HostKit

/// What a chunk's record says about its bytes, gathered cluster by cluster while they are in the CPU's cache.
struct ChunkScan {
    private(set) var bitmap: UInt64 = 0
    private let bytes: UnsafeRawBufferPointer
    private var digest: ChunkDigest?
    private var checksum: UInt32 = 0
    private var done = 0

    /// - Parameter bytes: the chunk's.
    init(_ bytes: UnsafeRawBufferPointer, _ kind: DiskConversion.Checksum) {
        self.bytes = bytes
        digest = kind == .sha256 ? ChunkDigest() : nil
    }

    /// The first `end` bytes are final.
    mutating func filled(_ end: Int) {
        while done < end {
            let stop = min(done + Chunk.clusterSize, bytes.count)
            guard stop <= end else { return }
            let part = UnsafeRawBufferPointer(rebasing: bytes[done..<stop])
            let isZero = isZero(part)
            if !isZero { bitmap |= 1 << UInt64(done / Chunk.clusterSize) }
            if digest == nil { checksum = crc32(part, checksum) } else { digest?.add(part, isZero: isZero) }
            done = stop
        }
    }

    /// 32 bytes: a `ChunkDigest`, or a CRC-32 where digests aren't wanted and records still need a check.
    mutating func finish() -> [UInt8] {
        if let digest = digest?.finish() { return digest }
        return (0..<4).map { UInt8(truncatingIfNeeded: checksum >> ($0 * 8)) } + [UInt8](repeating: 0, count: 28)
    }
}

/// The content digest, fed by threads that finish chunks out of order. Holds what came early only.
struct OrderedDigests {
    private var content: ContentDigest
    /// The first ticket not yet added.
    private var next: UInt64 = 0
    private var early: [UInt64: (index: UInt64, digest: [UInt8]?)] = [:]

    init(capacity: UInt64) { content = ContentDigest(capacity: capacity) }

    /// - Parameter digest: nil for a chunk of zeros.
    mutating func add(_ digest: [UInt8]?, chunk index: UInt64, ticket: UInt64) {
        early[ticket] = (index, digest)
        while let entry = early.removeValue(forKey: next) {
            if let digest = entry.digest { content.add(digest, chunk: entry.index) }
            next += 1
        }
    }

    mutating func finalize() -> [UInt8] { content.finalize() }
}
