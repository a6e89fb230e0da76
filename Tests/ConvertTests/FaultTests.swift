import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// A file that nbdkit serves through FUSE, so that the kernel itself reports its errors.
private struct FaultyFile {
    let path: String
    private let pid: pid_t

    /// - Parameter nbdkit: the arguments that say what the file holds.
    init(_ path: String, _ nbdkit: [String]) throws {
        self.path = path
        try File(path, O_RDWR | O_CREAT).synchronize()
        let output = try File("\(path).log", O_RDWR | O_CREAT)
        pid = try start(["nbdfuse", path, "[", "nbdkit", "-f"] + nbdkit + ["]"], output: output)
        let deadline = ContinuousClock.now + .seconds(20)
        while try File(path, O_RDONLY).size == 0 {
            if ContinuousClock.now > deadline {
                throw MigrationError(.unavailable, String(decoding: try Files.read(output.path), as: UTF8.self))
            }
            usleep(10_000)
        }
    }

    func remove() {
        _ = try? run("fusermount3", "-u", "-z", path)
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0 && errno == EINTR {}
    }
}

@Suite(.enabled(if: getuid() == 0 && Files.exists("/dev/fuse") && Files.exists("/dev/loop-control")))
struct FaultTests {
    /// Bad sectors in the middle of the source.
    @Test(arguments: [SourceKind.raw, .monolithicSparse, .stream], TargetFormat.allCases)
    func aSourceWithBadSectorsIsReported(_ kind: SourceKind, _ target: TargetFormat) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 40 << 20, seed: 40)
        let healthy = try kind.make(from: folder.file("made.raw"), in: folder)
        let half = try File(healthy, O_RDONLY).size / 2
        let read = "dd if=\(healthy) skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"
        let faulty = try FaultyFile(
            folder.file("faulty"),
            [
                "eval", "get_size=stat -c %s \(healthy)",
                "pread=if [ $(($4 + $3)) -gt \(half) ] && [ $4 -lt \(half + 65536) ];"
                    + " then echo EIO bad sector >&2; exit 1; fi; \(read)",
            ])
        defer { faulty.remove() }
        let conversion = DiskConversion(
            source: FileRegion(path: faulty.path), sourceFormat: kind.format, targetFormat: target,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk"))
        let error = try #require(failure { _ = try conversion.run() })
        #expect(error.code == .dataLoss && error.hint != nil, "\(error)")
        #expect(error.message.contains("read at byte") && error.message.contains(faulty.path), "\(error)")
        #expect(!Files.exists(conversion.finalPath))
    }

    /// The disk under the target's file system fails in the middle, comes back, and the work goes on where it was.
    @Test(arguments: TargetFormat.allCases, [Compression?.none, .zstd])
    func aTargetThatFailsIsReportedAndContinued(_ target: TargetFormat, _ compression: Compression?) throws {
        guard target == .qcow2 || compression == nil else { return }
        var options = DiskConversion.Options()
        options.checkpointBytes = 1
        options.threads = 2
        options.compression = compression
        let scene = try Scene(target, options: options)
        let volume = scene.folder.file("volume")
        let broken = scene.folder.file("broken")
        try File(scene.folder.file("backing"), O_RDWR | O_CREAT).truncate(to: 128 << 20)
        let disk = try FaultyFile(
            scene.folder.file("device"),
            [
                "--filter=error", "file", scene.folder.file("backing"), "error-pwrite=EIO",
                "error-pwrite-rate=100%", "error-pwrite-file=\(broken)",
            ])
        defer { disk.remove() }
        try Files.createDirectories(volume)
        try run("mkfs.ext4", "-q", "-F", disk.path)
        try run("mount", "-o", "loop", disk.path, volume)
        defer { _ = try? run("umount", volume) }
        var conversion = DiskConversion(
            source: scene.conversion.source, sourceFormat: .vmdk, targetFormat: target, workDirectory: volume,
            name: "disk0", finalPath: "\(volume)/disk", options: options)
        // Slow enough that it breaks between the first checkpoint and the end. A log that grew again has that one on
        // stable storage.
        conversion.options.rateLimit = RateLimit(bytesPerSecond: 1 << 20)
        var firstSize: UInt64?
        let error = try #require(
            failure {
                _ = try conversion.run { _ in
                    guard let size = try? File(conversion.checkpointPath, O_RDONLY).size, size > 64 else { return }
                    if let firstSize, size > firstSize { _ = try? File(broken, O_RDWR | O_CREAT) }
                    firstSize = firstSize ?? size
                }
            })
        #expect([.dataLoss, .permissionDenied].contains(error.code), "\(error)")
        #expect(error.message.contains(volume), "\(error)")
        #expect(!Files.exists(conversion.finalPath))
        // As an administrator would: unmount, repair, mount.
        try Files.remove(broken)
        // A thread about to end may hold the image a little longer.
        try run("sh", "-c", "for i in $(seq 100); do umount \(volume) && exit; sleep 0.05; done 2>&1; exit 1")
        try run("sh", "-c", "e2fsck -f -p \(disk.path) >/dev/null; [ $? -lt 4 ]")
        try run("mount", "-o", "loop", disk.path, volume)
        conversion.options.rateLimit = nil
        var last: DiskConversion.Progress?
        let result = try conversion.run { last = $0 }
        #expect(result.notice == .resumed)
        #expect(last.map { $0.resumedBytes > 0 } == true)
        try scene.judge(result)
    }

    /// A source that becomes shorter while it is read.
    @Test(arguments: [SourceKind.raw, .monolithicSparse, .stream, .twoGbMaxExtentFlat])
    func aSourceCutMeanwhileIsReported(_ kind: SourceKind) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 40 << 20, seed: 40)
        let source = try kind.make(from: folder.file("made.raw"), in: folder)
        let data = kind == .twoGbMaxExtentFlat ? folder.file("source-f001.vmdk") : source
        let conversion = DiskConversion(
            source: FileRegion(path: source), sourceFormat: kind.format, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk"))
        var isCut = false
        let error = try #require(
            failure {
                _ = try conversion.run { _ in
                    guard !isCut else { return }
                    isCut = true
                    _ = truncate(data, 700_000)
                }
            })
        #expect(isCut)
        #expect(error.code == .dataLoss || error.code == .failedPrecondition, "\(error)")
        #expect(error.message.contains(data), "\(error)")
        #expect(!Files.exists(conversion.finalPath))
    }
}
