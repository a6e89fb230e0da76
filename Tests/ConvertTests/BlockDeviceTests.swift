import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing
import Volumes

/// Conversions onto real block devices.
@Suite(.enabled(if: getuid() == 0)) struct BlockDeviceTests {
    private let folder: TemporaryFolder
    private let raw: String

    init() throws {
        folder = try TemporaryFolder("work")
        raw = folder.file("made.raw")
    }

    private func device(_ size: UInt64, readOnly: Bool = false) throws -> LoopDevice {
        try LoopDevice(folder.file("device"), size: size, readOnly: readOnly)
    }

    private func conversion(_ device: LoopDevice, overwrites: Bool = false) throws -> DiskConversion {
        var options = DiskConversion.Options()
        options.checkpointBytes = 1
        options.threads = 2
        var conversion = DiskConversion(
            .file(FileRegion(path: raw), .raw), to: .volume(try BlockDevice(device.path)),
            workDirectory: folder.file("work"), name: "disk0", options: options)
        conversion.overwrites = overwrites
        return conversion
    }

    /// The disk and then nothing but zeros.
    private func judge(_ device: LoopDevice) throws {
        let disk = try Files.read(raw, limit: 1 << 30)
        let size = try File(folder.file("device"), O_RDONLY).size
        #expect(try device.contents(disk.count) == disk)
        let rest = try device.contents(Int(size) - disk.count, at: UInt64(disk.count))
        #expect(rest.withUnsafeBytes { isZero($0) })
    }

    @Test(arguments: [512, 4096, 4 << 20 | 512, 13 << 20 | 1536] as [UInt64], [0, 9 << 20 | 512] as [UInt64])
    func holdsTheDiskAndZerosAfterwards(_ capacity: UInt64, _ rest: UInt64) throws {
        try makeRawDisk(raw, size: capacity, seed: capacity)
        let device = try device(max(4096, capacity + rest))
        let conversion = try conversion(device)
        let result = try conversion.run()
        #expect(result.notice == .fresh && result.path == device.path)
        #expect(result.contentDigest == (try documentedDigest(raw)))
        try judge(device)
        #expect(try conversion.run().notice == .alreadyPublished)
    }

    @Test func aDiskOfZerosClearsTheDevice() throws {
        try File(raw, O_RDWR | O_CREAT).truncate(to: 13 << 20)
        let device = try device(17 << 20)
        _ = try conversion(device).run()
        try judge(device)
    }

    @Test(arguments: [
        "convert.image-created", "convert.checkpoint:2", "convert.image-finished", "convert.disk-published",
    ])
    func continuesAfterDyingAnywhere(_ failpoint: String) async throws {
        try makeRawDisk(raw, size: 21 << 20, seed: 40)
        let device = try device(24 << 20)
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [
                failpoint = failpoint as String, raw = raw as String, work = folder.file("work") as String,
                path = device.path as String
            ] in
            setenv(Failpoint.environmentKey, failpoint, 1)
            var options = DiskConversion.Options()
            options.checkpointBytes = 1
            options.threads = 2
            _ = try DiskConversion(
                .file(FileRegion(path: raw), .raw), to: .volume(try BlockDevice(path)), workDirectory: work,
                name: "disk0", options: options
            ).run()
        }
        let isPublished = failpoint == "convert.disk-published"
        if !isPublished {
            // Nothing boots from it, nothing recognises it, and it says what it is.
            #expect(try device.contents(31) == Array("FLOTILLA: UNFINISHED DISK IMAGE".utf8))
            #expect(try device.contents((4 << 20) - 4096, at: 4096).withUnsafeBytes { isZero($0) })
            #expect(try BlockDevice(device.path).contents() == nil)
        }
        var last: DiskConversion.Progress?
        let result = try conversion(device).run { last = $0 }
        #expect(result.notice == (isPublished ? .alreadyPublished : .resumed))
        if failpoint == "convert.image-finished" { #expect(last.map { $0.resumedBytes > 0 } == true) }
        try judge(device)
    }

    @Test func aForeignMarkOrALostOneIsStartedOver() throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        let device = try device(9 << 20)
        let stop = StopFlag()
        let interrupted = try conversion(device)
        #expect(failure { _ = try interrupted.run(stop: stop) { _ in stop.set() } }?.code == .cancelled)
        try makeRawDisk(raw, size: 9 << 20, seed: 10)
        let changed = interrupted
        #expect(try changed.run().notice == .restarted)
        try judge(device)
    }

    @Test func aDeviceThatWasWrittenMeanwhileIsNotPublished() throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        let device = try device(9 << 20)
        let conversion = try conversion(device)
        let notice = try conversion.convert()
        try File(device.path, O_RDWR).write([1, 2, 3], at: 0)
        let error = failure { _ = try conversion.publish(notice) }
        #expect(error?.code == .failedPrecondition && error?.message.contains(device.path) == true)
    }

    @Test func whatIsWithdrawnIsUnfinishedAgain() throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        let device = try device(9 << 20)
        let conversion = try conversion(device)
        _ = try conversion.run()
        try conversion.withdraw()
        #expect(try device.contents(8) == Array("FLOTILLA".utf8))
        #expect(try conversion.run().notice == .resumed)
        try judge(device)
    }

    @Test(arguments: [
        ("mkfs.ext4 -q -L precious", "ext4"), ("mkswap", "swap"), ("echo '2048,1M' | sfdisk -q", "dos"),
        ("echo 'label: gpt' | sfdisk -q", "gpt"),
        // Only the copy at the end is left.
        ("sh -c 'echo label: gpt | sfdisk -q $1; dd if=/dev/zero of=$1 bs=64k count=1 conv=notrunc' -", "gpt"),
    ])
    func whatItHoldsIsNotOverwrittenUnasked(_ command: String, _ kind: String) throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        let device = try device(16 << 20)
        try run("sh", "-c", "\(command) '\(device.path)'")
        let before = try device.contents(16 << 20)
        let error = try #require(failure { _ = try conversion(device).run() })
        #expect(error.code == .failedPrecondition && error.hint?.contains("--force") == true)
        #expect(error.message.contains(device.path) && error.message.contains(kind), "\(error.message)")
        #expect(try device.contents(16 << 20) == before)
        _ = try conversion(device, overwrites: true).run()
        try judge(device)
    }

    @Test func oneInUseIsRefused() async throws {
        let device = try device(16 << 20)
        func refusal() throws -> String {
            let error = try #require(failure { _ = try BlockDevice(device.path) })
            #expect(error.code == .failedPrecondition && error.hint != nil)
            return error.message
        }
        do {
            let other = try BlockDevice(device.path)
            defer { withExtendedLifetime(other) {} }
            #expect(try refusal().contains("the kernel has it in use"))
        }
        do {
            // Without a claim, as QEMU opens them; a reader doesn't matter.
            let program = try Daemon(
                "sh", "-c", "exec sleep 600 3<>'\(device.path)'", output: folder.file("said"))
            defer { withExtendedLifetime(program) {} }
            let said: Bool? = try await eventually {
                let message = failure { _ = try BlockDevice(device.path) }?.message
                return message?.contains("sleep (process \(program.pid)) has") == true ? true : nil
            }
            #expect(said == true)
            #expect(try BlockDevice(reading: device.path).use?.contains("sleep") == true)
        }
        do {
            let program = try Daemon(
                "sh", "-c", "exec 3<'\(device.path)'; touch '\(folder.file("open"))'; exec sleep 600",
                output: folder.file("said"))
            defer { withExtendedLifetime(program) {} }
            try await program.waits(for: folder.file("open"))
            _ = try BlockDevice(device.path)
        }
        try run("mkfs.ext4", "-q", device.path)
        let point = folder.file("mounted here")
        try Files.createDirectories(point)
        try run("mount", device.path, point)
        defer { _ = try? run("umount", point) }
        #expect(try refusal().contains("is mounted on"))
    }

    @Test func oneTooSmallOrReadOnlyIsRefused() throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        do {
            let device = try device((9 << 20) - 512)
            let before = try device.contents((9 << 20) - 512)
            let error = failure { _ = try conversion(device).run() }
            #expect(error?.code == .failedPrecondition && error?.message.contains("\(9 << 20)") == true)
            #expect(try device.contents((9 << 20) - 512) == before)
        }
        let device = try device(9 << 20, readOnly: true)
        let error = failure { _ = try BlockDevice(device.path) }
        #expect(error?.message.contains(device.path) == true)
        #expect(failure { _ = try BlockDevice(raw) }?.code == .invalidArgument)
    }
}
