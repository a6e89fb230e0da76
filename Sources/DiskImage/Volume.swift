/// A disk of fixed size that is written in place: a block device, an NBD export. Many threads use it at once; nobody
/// else does.
///
/// Offsets and counts of reads and writes are multiples of `blockSize`, memory begins on a page.
package protocol Volume: Sendable {
    /// For messages: "/dev/vdb", "nbd://host/disk".
    var name: String { get }
    /// Bytes.
    var size: UInt64 { get }
    /// A power of two, at most `Chunk.clusterSize`.
    var blockSize: Int { get }
    /// Whether writes bypass this host's page cache.
    var isDirect: Bool { get }

    /// Fills `buffer`.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws
    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws
    /// The range reads as zeros afterwards, whatever it held. Gives the space back where that is the same.
    ///
    /// - Parameter range: at most `Zeroing.largestStep` bytes.
    func zero(_ range: Range<UInt64>) throws
    /// Everything written so far is on stable storage when this returns.
    func flush() throws
    /// What it seems to hold, for people: "an ext4 file system", "a gpt partition table"; nil for nothing that is known.
    func contents() throws -> String?
}

extension Volume {
    package func read(at offset: UInt64, count: Int) throws -> [UInt8] {
        try withPages(count) {
            try read(at: offset, into: $0)
            return [UInt8]($0)
        }
    }

    package func write(_ bytes: some Collection<UInt8>, at offset: UInt64) throws {
        try withPages(bytes.count) {
            $0.copyBytes(from: bytes)
            try write(UnsafeRawBufferPointer($0), at: offset)
        }
    }

    private func withPages<Value>(
        _ count: Int, _ body: (UnsafeMutableRawBufferPointer) throws -> Value
    ) rethrows -> Value {
        let pages = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 4096)
        defer { pages.deallocate() }
        return try body(pages)
    }
}

/// Zeroes long ranges in steps that take a fraction of a second each, however fast the volume is.
package struct Zeroing {
    package static let largestStep: UInt64 = 1 << 30
    private static let smallestStep: UInt64 = 1 << 20
    private var step: UInt64 = 16 << 20

    package init() {}

    /// - Parameter didZero: told the bytes of each step; throws to stop.
    package mutating func zero(
        _ volume: any Volume, _ range: Range<UInt64>, _ didZero: (UInt64) throws -> Void
    ) throws {
        var position = range.lowerBound
        while position < range.upperBound {
            let count = min(step, range.upperBound - position)
            let time = try ContinuousClock().measure { try volume.zero(position..<position + count) }
            if time < .milliseconds(50), count == step { step = min(step * 2, Self.largestStep) }
            if time > .milliseconds(250) { step = max(step / 2, Self.smallestStep) }
            position += count
            try didZero(count)
        }
    }
}
