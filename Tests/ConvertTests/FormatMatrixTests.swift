import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

enum SourceKind: String, CaseIterable, Sendable {
    case raw, monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized
    /// streamOptimized with a footer, as ESXi writes it.
    case stream
    /// A descriptor over raw data, as on a datastore.
    case vmfs
    /// Two snapshots deep.
    case chain

    var format: DiskFormat { self == .raw ? .raw : .vmdk }

    /// Makes a source of this kind from a raw disk; returns its path.
    func make(from raw: String, in folder: TemporaryFolder) throws -> String {
        let path = folder.file("source.vmdk")
        switch self {
        case .raw: return raw
        case .stream:
            let made = try SourceKind.streamOptimized.make(from: raw, in: folder)
            try rewriteAsStream(made, folder.file("stream.vmdk"))
            return folder.file("stream.vmdk")
        case .vmfs:
            try run("cp", "--sparse=always", raw, folder.file("source-flat.vmdk"))
            let text = """
                # Disk DescriptorFile
                version=1
                CID=0badcafe
                parentCID=ffffffff
                createType="vmfs"
                RW \(try File(raw, O_RDONLY).size / 512) VMFS "source-flat.vmdk"
                """
            try File(path, O_RDWR | O_CREAT | O_TRUNC).write(Array(text.utf8), at: 0)
            return path
        case .chain:
            var current = try SourceKind.monolithicSparse.make(from: raw, in: folder)
            for (name, writes) in [("one", ["-P 1 0 512", "-z 0 512"]), ("two", ["-P 3 0 512"])] {
                let child = folder.file("\(name).vmdk")
                try run("qemu-img", "create", "-q", "-f", "vmdk", "-b", current, "-F", "vmdk", child)
                for write in writes { try run("qemu-io", "-f", "vmdk", "-c", "write \(write)", child) }
                current = child
            }
            return current
        default:
            try run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=\(rawValue)", raw, path)
            return path
        }
    }
}

enum Sink: CaseIterable {
    case qcow2, raw, qcow2zstd, qcow2zlib

    var format: TargetFormat { self == .raw ? .raw : .qcow2 }

    var options: DiskConversion.Options {
        var options = DiskConversion.Options()
        if self == .qcow2zstd { options.compression = .zstd }
        if self == .qcow2zlib { options.compression = .zlib(level: 1) }
        return options
    }

    /// Converts, and has qemu-img check the image and compare it with `judged`, a raw disk.
    @discardableResult
    func convert(
        _ source: String, _ kind: SourceKind, in folder: TemporaryFolder, judged: String
    ) throws -> (DiskConversion.Result, DiskConversion.Progress?) {
        let conversion = DiskConversion(
            source: FileRegion(path: source), sourceFormat: kind.format, targetFormat: format,
            workDirectory: folder.file("work"), name: "\(self)", finalPath: folder.file("disk.\(self)"),
            options: options)
        var last: DiskConversion.Progress?
        let result = try conversion.run { last = $0 }
        if format == .qcow2 { try run("qemu-img", "check", "-q", "-f", "qcow2", result.path) }
        try run("qemu-img", "compare", "-q", "-f", "raw", "-F", format.rawValue, judged, result.path)
        #expect(!Files.exists(conversion.partialPath) && Files.exists(conversion.checkpointPath))
        return (result, last)
    }
}

@Suite struct FormatMatrixTests {
    static let sizes: [UInt64] = [512, 20 << 20 | 1536, 70 << 20, 5 << 30 | 512]

    /// FLOTILLA_MATRIX=full also compresses the large disks, which takes minutes.
    static let isFull = getenv("FLOTILLA_MATRIX").map { String(cString: $0) } == "full"

    /// Every kind of source into every format, judged by qemu-img.
    @Test(arguments: SourceKind.allCases, sizes)
    func convertsExactly(_ kind: SourceKind, _ size: UInt64) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: size, seed: size)
        let source = try kind.make(from: folder.file("made.raw"), in: folder)
        let judged = folder.file("judged.raw")
        try run("qemu-img", "convert", "-f", kind.format.rawValue, "-O", "raw", source, judged)
        let digest = try documentedDigest(judged)
        #expect(try ContentDigest.compute(kind.format.open(FileRegion(path: source))) == digest)
        for sink in Sink.allCases where size < 32 << 20 || sink == .qcow2 || sink == .raw || Self.isFull {
            let (result, last) = try sink.convert(source, kind, in: folder, judged: judged)
            #expect(result.contentDigest == digest)
            #expect(result.capacity == (try File(judged, O_RDONLY).size))
            #expect(result.notice == .fresh)
            #expect(last?.doneBytes == result.capacity)
            #expect(result.allocatedBytes < 16 << 20)
            if kind == .streamOptimized || kind == .stream {
                #expect(result.sourceSHA256 == hex(Digest.hash(.sha256, try Files.read(source))))
            }
        }
    }

    /// More than 32 bits of sectors.
    @Test(arguments: [SourceKind.raw, .monolithicSparse, .streamOptimized])
    func convertsBeyondFourTebibytes(_ kind: SourceKind) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 4 << 40 | 512, seed: 4)
        let source = try kind.make(from: folder.file("made.raw"), in: folder)
        for sink in Self.isFull ? Sink.allCases : [.qcow2] {
            let (result, _) = try sink.convert(source, kind, in: folder, judged: folder.file("made.raw"))
            #expect(result.allocatedBytes < 16 << 20)
        }
    }

    /// What another program than QEMU wrote: Python's zlib, its own tables and footer.
    @Test(arguments: [512, 20 << 20 | 1536] as [UInt64])
    func readsStreamsOfAnotherWriter(_ size: UInt64) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: size, seed: size)
        let source = folder.file("source.vmdk")
        try run(
            "/usr/bin/python3", "-c", "import sys, VMDKstream; VMDKstream.convert_to_stream(*sys.argv[1:])",
            folder.file("made.raw"), source)
        for sink in Sink.allCases {
            try sink.convert(source, .stream, in: folder, judged: folder.file("made.raw"))
        }
    }

    @Test(arguments: [SourceKind.raw, .vmfs])
    func aDiskWithoutSectorsIsRefused(_ kind: SourceKind) throws {
        let folder = try TemporaryFolder("work")
        try File(folder.file("made.raw"), O_RDWR | O_CREAT).truncate(to: 0)
        let source = try kind.make(from: folder.file("made.raw"), in: folder)
        let conversion = DiskConversion(
            source: FileRegion(path: source), sourceFormat: kind.format, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk"))
        let error = failure { _ = try conversion.run() }
        #expect(error?.code == .invalidArgument && error?.message.contains(source) == true, "\(error as Any)")
        #expect(!Files.exists(conversion.finalPath) && !Files.exists(conversion.partialPath))
    }

    @Test func convertsAMemberOfAnArchiveInPlace() throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 9 << 20, seed: 1)
        let stream = try Files.read(SourceKind.stream.make(from: folder.file("made.raw"), in: folder))
        let archive = try File(folder.file("appliance.ova"), O_RDWR | O_CREAT)
        try archive.write([UInt8](repeating: 0xAA, count: 2560) + stream + [UInt8](repeating: 0xBB, count: 9000), at: 0)
        var options = DiskConversion.Options()
        options.expectedDigests = [
            .sha1: hex(Digest.hash(.sha1, stream)), .sha256: hex(Digest.hash(.sha256, stream)).uppercased(),
            .sha512: hex(Digest.hash(.sha512, stream)),
        ]
        let result = try DiskConversion(
            source: FileRegion(path: archive.path, offset: 2560, length: UInt64(stream.count)), sourceFormat: .vmdk,
            targetFormat: .qcow2, workDirectory: folder.file("work"), name: "disk0",
            finalPath: folder.file("disk.qcow2"), options: options
        ).run()
        #expect(result.sourceBytes == UInt64(stream.count))
        #expect(result.contentDigest == (try documentedDigest(folder.file("made.raw"))))
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder.file("made.raw"), result.path)
    }

    /// 64 TiB with two pieces of data: tables, time and space follow the data.
    @Test func hugeSparseDisks() throws {
        let folder = try TemporaryFolder("work")
        let lines = [
            "# Disk DescriptorFile", "createType=\"vmfs\"", "RW 2048 FLAT \"a-flat.vmdk\"",
            "RW \((1 << 37) - 4096) ZERO", "RW 2048 FLAT \"a-flat.vmdk\"",
        ]
        let flat = try File(folder.file("a-flat.vmdk"), O_RDWR | O_CREAT)
        try flat.write([UInt8](repeating: 3, count: 1 << 20), at: 0)
        let text = Array(lines.joined(separator: "\n").utf8)
        try File(folder.file("a.vmdk"), O_RDWR | O_CREAT).write(text, at: 0)
        let result = try DiskConversion(
            source: FileRegion(path: folder.file("a.vmdk")), sourceFormat: .vmdk, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk.qcow2")
        ).run()
        #expect(result.capacity == ((1 << 37) - 4096 + 4096) * 512)
        #expect(result.allocatedBytes < 4 << 20)
        try run("qemu-img", "check", "-f", "qcow2", result.path)
        try run("qemu-io", "-f", "qcow2", "-c", "read -P 3 0 1M", "-c", "read -P 0 1M 64M", result.path)
        try run("qemu-io", "-f", "qcow2", "-c", "read -P 3 \(result.capacity - 1_048_576) 1M", result.path)
    }
}
