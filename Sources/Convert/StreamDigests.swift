import DiskImage
import HostKit
import MigrationModel

/// Digests of a source stream: SHA-256, and those a manifest expects. One thread at a time.
struct StreamDigests {
    private let name: String
    private let expected: [Digest.Algorithm: String]
    private let digests: [Digest.Algorithm: Digest]
    /// Bytes digested.
    private(set) var length: UInt64 = 0

    /// - Parameters:
    ///   - wanted: false leaves out the SHA-256 that nobody expects.
    ///   - expected: as hex, either case.
    init(name: String, wanted: Bool, expected: [Digest.Algorithm: String]) {
        self.name = name
        self.expected = expected
        let algorithms = Set(expected.keys).union(wanted || !expected.isEmpty ? [.sha256] : [])
        digests = Dictionary(uniqueKeysWithValues: algorithms.map { ($0, Digest($0)) })
    }

    mutating func update(_ bytes: UnsafeRawBufferPointer) {
        for digest in digests.values { digest.update(bytes) }
        length += UInt64(bytes.count)
    }

    /// Returns the SHA-256, if it was computed. Throws `dataLoss` when an expected digest differs.
    func finish() throws -> [UInt8]? {
        let results = digests.mapValues { $0.finalize() }
        for (algorithm, wanted) in expected {
            let found = hex(results[algorithm] ?? [])
            guard found == wanted.lowercased() else {
                throw MigrationError(
                    .dataLoss, "\(name): \(algorithm.rawValue) is \(found), expected \(wanted.lowercased())",
                    hint: "the file was damaged or changed after its manifest was written: copy or export it again")
            }
        }
        return results[.sha256]
    }
}

/// A byte source that digests, counts and paces what passes through it.
final class WatchedSource: ByteSource {
    private let source: any ByteSource
    private let limit: RateLimit?
    private let stop: StopFlag
    private(set) var digests: StreamDigests

    init(_ source: any ByteSource, _ digests: StreamDigests, _ limit: RateLimit?, _ stop: StopFlag) {
        self.source = source
        self.digests = digests
        self.limit = limit
        self.stop = stop
    }

    var name: String { source.name }

    func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        let count = try source.read(into: buffer)
        try limit?.take(count, stop: stop)
        digests.update(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
        return count
    }
}
