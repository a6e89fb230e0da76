import DiskImage
import HostKit
import MigrationModel

/// Digests of a source whose chunks are read in no order that a digest could follow: its files, or their regions, one
/// after the other, on a thread of its own.
struct SourceHasher: Sendable {
    let files: [SourceFile]
    let name: String
    /// As hex, either case.
    let expected: [Digest.Algorithm: String]
    /// Whether a SHA-256 is wanted that nobody expects.
    let isWanted: Bool

    /// Bytes in the stream.
    var length: UInt64 { files.reduce(0) { $0 + $1.length } }

    /// Reading the stream is worth it if someone expects a digest, if it takes no more than a minute or so, or if it
    /// costs about what the conversion reads anyway. Of a large thin flat file most would be holes.
    var isWorthwhile: Bool {
        if !expected.isEmpty { return true }
        return isWanted
            && (length <= 64 << 30 || files.allSatisfy { $0.allocatedBytes >= $0.identity.size / 2 })
    }

    var digests: StreamDigests { StreamDigests(name: name, wanted: isWanted, expected: expected) }

    /// Reads everything; returns the SHA-256. Throws `dataLoss` when an expected digest differs.
    func run(stopped: () throws -> Void) throws -> [UInt8]? {
        var digests = digests
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        for file in files {
            let source = try FileSource(file)
            while true {
                try stopped()
                let count = try source.read(into: buffer)
                if count == 0 { break }
                digests.update(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
            }
        }
        return try digests.finish()
    }
}
