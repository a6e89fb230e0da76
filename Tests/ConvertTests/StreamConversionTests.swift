import Convert
import DiskImage
import Dispatch
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// Conversions whose source is a pipe, whose target is compressed, or whose pace is limited.
@Suite struct StreamConversionTests {
    /// The read end of a pipe that a thread fills from a file.
    private func pipe(from path: String) throws -> Int32 {
        var ends: [Int32] = [0, 0]
        try #require(Glibc.pipe(&ends) == 0)
        let (input, bytes) = (ends[1], try Files.read(path, limit: 1 << 30))
        spawnThread("pipe") {
            signal(SIGPIPE, SIG_IGN)
            var done = 0
            while done < bytes.count {
                let count = bytes.withUnsafeBytes {
                    write(input, $0.baseAddress.map { $0 + done }, bytes.count - done)
                }
                if count <= 0 { break }
                done += count
            }
            close(input)
        }
        return ends[0]
    }

    private func conversion(
        _ scene: Scene, _ descriptor: Int32, _ target: TargetFormat, _ options: DiskConversion.Options = .init()
    ) -> DiskConversion {
        DiskConversion(
            stream: DiskConversion.Stream(name: "standard input") {
                DescriptorSource(descriptor, name: "standard input", stop: $0)
            }, targetFormat: target, workDirectory: scene.folder.file("work"), name: "piped",
            finalPath: scene.folder.file("piped.\(target)"), options: options)
    }

    @Test(arguments: TargetFormat.allCases)
    func convertsAPipe(_ target: TargetFormat) throws {
        let scene = try Scene()
        let source = scene.conversion.source.path
        let digest = hex(Digest.hash(.sha256, try Files.read(source)))
        var options = DiskConversion.Options()
        options.expectedDigests = [.sha256: digest]
        let descriptor = try pipe(from: source)
        defer { close(descriptor) }
        let result = try conversion(scene, descriptor, target, options).run()
        #expect(result.sourceSHA256 == digest)
        #expect(result.sourceBytes == (try File(source, O_RDONLY).size))
        #expect(result.notice == .fresh)
        try scene.judge(result)
    }

    @Test func aPipeThatBreaksOffPublishesNothingAndIsStartedOver() throws {
        let scene = try Scene()
        let source = scene.conversion.source.path
        let cut = scene.folder.file("cut.vmdk")
        try File(cut, O_RDWR | O_CREAT).write(Array(try Files.read(source).dropLast(70_000)), at: 0)
        let broken = try pipe(from: cut)
        defer { close(broken) }
        let error = failure { _ = try conversion(scene, broken, .qcow2).run() }
        #expect(error?.code == .dataLoss && error?.message.contains("standard input") == true)
        #expect(!Files.exists(scene.folder.file("piped.qcow2")))
        let whole = try pipe(from: source)
        defer { close(whole) }
        let result = try conversion(scene, whole, .qcow2).run()
        #expect(result.notice == .restarted)
        try scene.judge(result)
    }

    @Test func aPipeWithoutAWriterIsCancelledWithinASecond() throws {
        let scene = try Scene()
        var ends: [Int32] = [0, 0]
        try #require(Glibc.pipe(&ends) == 0)
        defer { for end in ends { close(end) } }
        let stop = StopFlag()
        DispatchQueue.global().asyncAfter(deadline: .now() + .milliseconds(50)) { stop.set() }
        let start = ContinuousClock.now
        let error = failure { _ = try conversion(scene, ends[0], .raw).run(stop: stop) }
        #expect(error?.code == .cancelled)
        #expect(ContinuousClock.now - start < .seconds(1))
    }

    /// Out of guest order, as `qemu-img convert -W` writes: found through the tables, digested all the same.
    @Test(arguments: [DiskConversion.Checksum.sha256, .none])
    func chunksOutOfOrderAreConverted(_ checksum: DiskConversion.Checksum) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 70 << 20, seed: 3)
        let source = folder.file("source.vmdk")
        try run("qemu-img", "create", "-f", "vmdk", "-o", "subformat=streamOptimized", source, "70M")
        for (offset, pattern) in [(40, 1), (8, 2), (60, 3), (0, 4)] {
            try run("qemu-io", "-f", "vmdk", "-c", "write -c -P \(pattern) \(offset)M 64k", source)
        }
        var options = DiskConversion.Options()
        options.checksum = checksum
        let result = try DiskConversion(
            source: FileRegion(path: source), sourceFormat: .vmdk, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk.qcow2"), options: options
        ).run()
        try run("qemu-img", "check", "-f", "qcow2", result.path)
        try run("qemu-img", "compare", "-f", "vmdk", "-F", "qcow2", source, result.path)
        let isHashed = checksum == .sha256
        #expect(result.sourceSHA256 == (isHashed ? hex(Digest.hash(.sha256, try Files.read(source))) : nil))
        #expect((result.contentDigest != nil) == isHashed)
    }

    @Test(arguments: [Compression.zlib(), .zlib(level: 1), .zstd], [SourceKind.stream, .raw])
    func compressesExactly(_ compression: Compression, _ kind: SourceKind) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 71 << 20 | 1536, seed: 8)
        let source = try kind.make(from: folder.file("made.raw"), in: folder)
        var options = DiskConversion.Options()
        options.compression = compression
        let result = try DiskConversion(
            source: FileRegion(path: source), sourceFormat: kind.format, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk.qcow2"), options: options
        ).run()
        #expect(result.contentDigest == (try documentedDigest(folder.file("made.raw"))))
        try run("qemu-img", "check", "-f", "qcow2", result.path)
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder.file("made.raw"), result.path)
    }

    @Test func rawImagesAreNotCompressed() throws {
        var options = DiskConversion.Options()
        options.compression = .zstd
        let scene = try Scene(.raw, options: options)
        #expect(failure { _ = try scene.conversion.run() }?.code == .invalidArgument)
    }

    @Test(arguments: [Compression.zlib(), .zstd])
    func compressedImagesAreContinued(_ compression: Compression) async throws {
        var options = DiskConversion.Options()
        options.checkpointBytes = 1
        options.threads = 2
        options.compression = compression
        let scene = try Scene(options: options)
        let stop = StopFlag()
        // Stops once something was written and recorded.
        _ = failure {
            _ = try scene.conversion.run(stop: stop) { if $0.writtenBytes > 0 { stop.set() } }
        }
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        if !stop.isSet { return }
        #expect(result.notice == .alreadyPublished || last.map { $0.resumedBytes > 0 } == true)
        try scene.judge(result)
    }

    @Test func theRateIsSharedAndKept() throws {
        let limit = RateLimit(bytesPerSecond: 10_000_000)
        let stop = StopFlag()
        let group = DispatchGroup()
        let start = ContinuousClock.now
        for _ in 0..<4 {
            group.enter()
            spawnThread("rate") {
                for _ in 0..<10 { try? limit.take(100_000, stop: stop) }
                group.leave()
            }
        }
        group.wait()
        #expect(ContinuousClock.now - start >= .milliseconds(390))
        stop.set()
        #expect(failure { try limit.take(100_000_000, stop: stop) }?.code == .cancelled)
    }

    @Test func differencesAreFoundAcrossFormats() throws {
        let folder = try TemporaryFolder("work")
        let raw = folder.file("made.raw")
        try makeRawDisk(raw, size: 70 << 20, seed: 5)
        let source = try SourceKind.stream.make(from: raw, in: folder)
        func disks() throws -> (any DiskSource, any DiskSource) {
            (try DiskFormat.vmdk.open(FileRegion(path: source)), try DiskFormat.raw.open(FileRegion(path: raw)))
        }
        var (one, two) = try disks()
        #expect(try firstDifference(one, two) == nil)
        for offset: UInt64 in [69 << 20 | 77, 0] {
            let file = try File(raw, O_RDWR)
            let old = try file.readExactly(at: offset, count: 1)[0]
            try file.write([old ^ 1], at: offset)
            (one, two) = try disks()
            #expect(try firstDifference(one, two) == offset)
            #expect(try firstDifference(two, one) == offset)
        }
    }
}
