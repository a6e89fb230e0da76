import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// Disks that guests could have written, drawn from a seed: a failing test names it. FLOTILLA_SEEDS says how many
/// (10), FLOTILLA_FIRST_SEED from which on (1).
@Suite struct RandomWriteTests {
    static let seeds: [UInt64] = {
        func number(_ name: String, _ standard: UInt64) -> UInt64 {
            getenv(name).flatMap { UInt64(String(cString: $0)) } ?? standard
        }
        let first = number("FLOTILLA_FIRST_SEED", 1)
        return Array(first..<first + number("FLOTILLA_SEEDS", 10))
    }()

    enum Kind: CaseIterable {
        case raw, monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized, stream
        case chain
    }

    @Test(arguments: seeds)
    func convertsWhatGuestsWrite(_ seed: UInt64) throws {
        var random = Seeded(state: seed)
        let folder = try TemporaryFolder("work")
        let disk = try RandomDisk(&random, folder)
        let kind = Kind.allCases[Int(seed % UInt64(Kind.allCases.count))]
        let source = try disk.make(kind, &random)
        let format: DiskFormat = kind == .raw ? .raw : .vmdk

        var options = DiskConversion.Options()
        options.threads = Int.random(in: 1...6, using: &random)
        options.checkpointBytes = Bool.random(using: &random) ? 1 : 256 << 20
        let target: TargetFormat = Int.random(in: 0..<4, using: &random) == 0 ? .raw : .qcow2
        if target == .qcow2 { options.compression = random.pick([nil, .zstd, .zlib(level: 1)]) }
        let what =
            "seed \(seed): \(kind) of \(disk.size) bytes into \(target) \(String(describing: options.compression))"

        let result = try DiskConversion(
            source: FileRegion(path: source), sourceFormat: format, targetFormat: target,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk"), options: options
        ).run()
        #expect(result.contentDigest == (try documentedDigest(disk.model)), "\(what)")
        if target == .qcow2 { try run("qemu-img", "check", "-f", "qcow2", result.path) }
        try run("qemu-img", "compare", "-f", "raw", "-F", target.rawValue, disk.model, result.path)
        let same = try firstDifference(
            format.open(FileRegion(path: source)), DiskFormat.raw.open(FileRegion(path: disk.model)))
        #expect(same == nil, "\(what)")
    }
}

/// A list of writes, and a raw disk they were applied to without any image format in between.
private struct RandomDisk {
    private struct Write {
        let offset: UInt64
        let count: Int
        /// nil: bytes of the pattern file.
        let byte: UInt8?
    }

    let size: UInt64
    let model: String
    private let folder: TemporaryFolder
    private let patterns: String
    private var writes: [Write] = []

    init(_ random: inout Seeded, _ folder: TemporaryFolder) throws {
        self.folder = folder
        model = folder.file("model.raw")
        patterns = folder.file("patterns")
        let largest: UInt64 = random.pick([1 << 10, 1 << 16, 5 << 20, 90 << 20, 90 << 20, 5 << 30])
        size = UInt64.random(in: 1...largest / 512, using: &random) * 512
        let bytes = try File(patterns, O_RDWR | O_CREAT)
        try bytes.write((0..<1 << 17).flatMap { _ in words(random.next()) }, at: 0)
        let raw = try File(model, O_RDWR | O_CREAT)
        try raw.truncate(to: size)
        for _ in 0..<Int.random(in: 0...24, using: &random) {
            // Near the edges of clusters, grains, chunks, grain tables and extents, or anywhere.
            let unit: UInt64 = random.pick([512, 64 << 10, 4 << 20, 32 << 20, 2 << 30])
            let edge = UInt64.random(in: 0...size / unit, using: &random) * unit
            let near = UInt64.random(in: 0...8, using: &random) * 512
            let offset = min(edge > near && Bool.random(using: &random) ? edge - near : edge + near, size - 512)
            let longest = random.pick([512, 8 << 10, 200 << 10, 1 << 20])
            let count = min(Int.random(in: 1...longest / 512, using: &random) * 512, Int(min(size - offset, 1 << 20)))
            let write = Write(offset: offset, count: count, byte: random.pick([nil, 0, 0x5A]))
            writes.append(write)
            let content =
                try write.byte.map { [UInt8](repeating: $0, count: count) } ?? bytes.readExactly(at: 0, count: count)
            try raw.write(content, at: offset)
        }
    }

    /// Returns the path of the source; for all but the formats that are written once, QEMU wrote it as a guest would.
    func make(_ kind: RandomWriteTests.Kind, _ random: inout Seeded) throws -> String {
        let path = folder.file("source.vmdk")
        switch kind {
        case .raw: return model
        case .streamOptimized: return try SourceKind.streamOptimized.make(from: model, in: folder)
        case .stream: return try SourceKind.stream.make(from: model, in: folder)
        case .monolithicFlat, .twoGbMaxExtentFlat:
            try create(path, kind)
            try apply(writes[...], to: path)
            return path
        case .monolithicSparse, .twoGbMaxExtentSparse:
            try create(path, kind, options: Bool.random(using: &random) ? ",zeroed_grain=on" : "")
            try apply(writes[...], to: path)
            return path
        case .chain:
            var current = folder.file("base.vmdk")
            try create(current, .monolithicSparse)
            var rest = writes[...]
            for depth in 1...Int.random(in: 1...4, using: &random) {
                let part = rest.prefix(Int.random(in: 0...rest.count, using: &random))
                try apply(part, to: current)
                rest = rest.dropFirst(part.count)
                let child = folder.file("delta-\(depth).vmdk")
                try run("qemu-img", "create", "-q", "-f", "vmdk", "-b", current, "-F", "vmdk", child)
                current = child
            }
            try apply(rest, to: current)
            return current
        }
    }

    private func create(_ path: String, _ kind: RandomWriteTests.Kind, options: String = "") throws {
        try run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=\(kind)\(options)", path, "\(size)")
    }

    private func apply(_ writes: ArraySlice<Write>, to path: String) throws {
        guard !writes.isEmpty else { return }
        var arguments = ["qemu-io", "-f", "vmdk"]
        for write in writes {
            let pattern =
                switch write.byte {
                case nil: "-s \(patterns)"
                case 0?: "-z"
                case let byte?: "-P \(byte)"
                }
            arguments += ["-c", "write -q \(pattern) \(write.offset) \(write.count)"]
        }
        try run(arguments + [path])
    }
}

extension Seeded {
    fileprivate mutating func pick<Value>(_ values: [Value]) -> Value {
        values[Int.random(in: values.indices, using: &self)]
    }
}

private func words(_ number: UInt64) -> [UInt8] { (0..<8).map { UInt8(truncatingIfNeeded: number >> ($0 * 8)) } }
