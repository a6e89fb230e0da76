import DiskImage
import Glibc
import HostKit
import MigrationModel

/// Digests of a source stream: its files, or their regions, one after the other.
struct SourceHasher: Sendable {
    let files: [SourceFile]
    let name: String
    /// As hex, either case.
    let expected: [Digest.Algorithm: String]

    /// Bytes in the stream.
    var length: UInt64 { files.reduce(0) { $0 + $1.length } }

    /// Reading the stream is worth it if someone expects a digest, if it takes no more than a minute or so, or if it
    /// costs about what the conversion reads anyway. Of a large thin flat file most would be holes.
    var isWorthwhile: Bool {
        !expected.isEmpty || length <= 64 << 30 || files.allSatisfy { $0.allocatedBytes >= $0.identity.size / 2 }
    }

    /// Reads everything; returns the SHA-256. Throws `dataLoss` when an expected digest differs.
    func run(stopped: () throws -> Void) throws -> [UInt8] {
        var digests: [Digest.Algorithm: Digest] = [.sha256: Digest(.sha256)]
        for algorithm in expected.keys where algorithm != .sha256 { digests[algorithm] = Digest(algorithm) }
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        for source in files {
            let file = try File(source.path, O_RDONLY)
            var done: UInt64 = 0
            while done < source.length {
                try stopped()
                let part = UnsafeMutableRawBufferPointer(
                    rebasing: buffer[..<Int(min(UInt64(buffer.count), source.length - done))])
                let got = try file.read(at: source.offset + done, into: part)
                guard got == part.count else {
                    throw MigrationError(
                        .dataLoss, "\(source.path): truncated while being read",
                        hint: "make sure that nothing writes to it")
                }
                for digest in digests.values { digest.update(UnsafeRawBufferPointer(part)) }
                done += UInt64(got)
            }
        }
        let results = digests.mapValues { $0.finalize() }
        for (algorithm, wanted) in expected {
            let found = hex(results[algorithm] ?? [])
            guard found == wanted.lowercased() else {
                throw MigrationError(
                    .dataLoss, "\(name): \(algorithm.rawValue) is \(found), expected \(wanted.lowercased())",
                    hint: "the file was damaged or changed after its manifest was written: copy or export it again")
            }
        }
        return results[.sha256] ?? []
    }
}
