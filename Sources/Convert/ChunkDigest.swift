import DiskImage
import HostKit

/// A chunk's part of the content digest: SHA-256 of the SHA-256 of its blocks of 64 KiB. Blocks of zeros cost nothing,
/// the others are digested two at a time.
struct ChunkDigest {
    private static let length = 32
    private static let zeroBlock = Digest.hash(.sha256, [UInt8](repeating: 0, count: Chunk.clusterSize))

    /// Of the blocks seen so far.
    private var digests: [UInt8] = []
    /// A whole block that waits for a second one.
    private var waiting: (block: UnsafeRawBufferPointer, place: Int)?

    init() { digests.reserveCapacity(Chunk.clusters * Self.length) }

    /// - Parameter block: `Chunk.clusterSize` bytes, or fewer at the disk's end. Stays as it is until the next
    ///   `finish`.
    mutating func add(_ block: UnsafeRawBufferPointer, isZero: Bool) {
        let place = digests.count
        guard !isZero || block.count < Chunk.clusterSize else {
            digests += Self.zeroBlock
            return
        }
        digests.append(contentsOf: repeatElement(0, count: Self.length))
        if block.count < Chunk.clusterSize {
            write { Digest.sha256(block, into: $0.digest(place)) }
        } else if let (other, otherPlace) = waiting {
            write { Digest.sha256(other, block, into: ($0.digest(otherPlace), $0.digest(place))) }
            waiting = nil
        } else {
            waiting = (block, place)
        }
    }

    mutating func finish() -> [UInt8] {
        if let (block, place) = waiting {
            write { Digest.sha256(block, into: $0.digest(place)) }
            waiting = nil
        }
        return Digest.hash(.sha256, digests)
    }

    private mutating func write(_ body: (UnsafeMutableRawBufferPointer) -> Void) {
        digests.withUnsafeMutableBytes { body($0) }
    }

    /// Of a chunk in memory.
    static func of(_ chunk: UnsafeRawBufferPointer) -> [UInt8] {
        var digest = ChunkDigest()
        for start in stride(from: 0, to: chunk.count, by: Chunk.clusterSize) {
            let block = UnsafeRawBufferPointer(rebasing: chunk[start..<min(start + Chunk.clusterSize, chunk.count)])
            digest.add(block, isZero: isZero(block))
        }
        return digest.finish()
    }

    /// Of `count` zeros.
    static func ofZeros(_ count: Int) -> [UInt8] {
        [UInt8](repeating: 0, count: count).withUnsafeBytes { of($0) }
    }
}

extension UnsafeMutableRawBufferPointer {
    fileprivate func digest(_ place: Int) -> UnsafeMutableRawBufferPointer {
        UnsafeMutableRawBufferPointer(rebasing: self[place..<place + 32])
    }
}
