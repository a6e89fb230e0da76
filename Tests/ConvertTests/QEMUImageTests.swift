import Convert
import DiskImage
import Dispatch
import Glibc
import HostKit
import MigrationModel
import Synchronization
import TestKit
import Testing

@Suite struct QEMUImageTests {
    @Test(arguments: QEMUImage.Format.allCases)
    func convertsWhatQEMUReads(_ format: QEMUImage.Format) throws {
        let folder = try TemporaryFolder("work")
        let raw = folder.file("made.raw")
        try makeRawDisk(raw, size: 20 << 20, seed: 6)
        let path = folder.file("disk.\(format.rawValue)")
        let subformat = format == .vpc ? ["-o", "force_size=on"] : []
        try run(["qemu-img", "convert", "-f", "raw", "-O", format.rawValue] + subformat + [raw, path])
        let image = try #require(try QEMUImage.detect(path))
        #expect(image.format == format)
        var last = 0.0
        let target = folder.file("disk.out")
        try image.convert(
            to: target, .raw, options: DiskConversion.Options(), bytesPerSecond: nil, stop: StopFlag()
        ) { last = $0 }
        #expect(last == 1)
        #expect(
            try QEMUImage.compare((raw, "raw"), (target, "raw"), stop: StopFlag()) == nil)
        try makeRawDisk(raw, size: 20 << 20, seed: 7)
        let difference = try QEMUImage.compare((raw, "raw"), (path, format.rawValue), stop: StopFlag())
        #expect(difference?.contains("mismatch") == true)
    }

    /// An image from elsewhere must not pull a file of this host into a disk.
    @Test func imagesThatLeadToOtherFilesAreRefused() throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("secret"), size: 1 << 20, seed: 1)
        let path = folder.file("disk.qcow2")
        try run("qemu-img", "create", "-f", "qcow2", "-b", folder.file("secret"), "-F", "raw", path)
        let image = QEMUImage(path: path, format: .qcow2)
        let error = failure { _ = try image.info() }
        #expect(error?.code == .failedPrecondition && error?.message.contains("backing-filename") == true)
    }

    /// Its owner may write another name into it whenever he likes.
    @Test(arguments: [["-b", "secret", "-F", "raw"], ["-o", "data_file=secret,data_file_raw=on"]])
    func whatIsWrittenIntoAnImageMeanwhileLeadsNowhere(_ options: [String]) throws {
        let folder = try TemporaryFolder("work")
        let (path, target) = (folder.file("a \"disk\".qcow2"), folder.file("the \"disk\".out"))
        try makeRawDisk(folder.file("made.raw"), size: 1 << 20, seed: 1)
        try run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder.file("made.raw"), path)
        let harmless = try Files.read(path)
        let other = folder.file("other.qcow2")
        let named = options.map { $0.replacing("secret", with: folder.file("secret")) }
        try makeRawDisk(folder.file("secret"), size: 1 << 20, seed: 2)
        try run(["qemu-img", "create", "-f", "qcow2"] + named + [other, "1M"])
        try makeRawDisk(folder.file("secret"), size: 1 << 20, seed: 2)
        let (secret, hostile) = (try Files.read(folder.file("secret")), try Files.read(other))

        let image = QEMUImage(path: path, format: .qcow2)
        let over = Atomic<Bool>(false)
        let ended = DispatchSemaphore(value: 0)
        spawnThread("owner") {
            let file = try? File(path, O_WRONLY)
            while !over.load(ordering: .relaxed) {
                for bytes in [hostile, harmless] {
                    bytes.withUnsafeBytes { try? file?.write($0, at: 0) }
                    usleep(.random(in: 0..<4000))
                }
            }
            ended.signal()
        }
        defer {
            over.store(true, ordering: .relaxed)
            ended.wait()
        }
        for _ in 0..<40 {
            try Files.remove(target)
            try? image.convert(
                to: target, .raw, options: DiskConversion.Options(), bytesPerSecond: nil, stop: StopFlag()
            ) { _ in }
            if Files.exists(target) { #expect(try Files.read(target) != secret) }
        }
        #expect(try Files.list(folder.path).allSatisfy { !$0.contains(".start") })
    }

    @Test func theInformationNamesTheFileAsItWasNamed() throws {
        let folder = try TemporaryFolder("work")
        let path = folder.file("a \"disk\".qcow2")
        try run("qemu-img", "create", "-f", "qcow2", path, "1M")
        let text = try QEMUImage(path: path, format: .qcow2).info()
        #expect(text.contains(#"\"disk\".qcow2""#) && !text.contains("/proc"))
    }

    /// A path that was checked, where somebody puts a link afterwards.
    @Test func aLinkIsNotFollowedWhereThePathWasResolved() throws {
        let folder = try TemporaryFolder("work")
        let path = try Files.canonical(folder.path) + "/disk.qcow2"
        try makeRawDisk(folder.file("made.raw"), size: 1 << 20, seed: 1)
        try run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder.file("made.raw"), path)
        let image = QEMUImage(path: path, format: .qcow2, isResolved: true)
        let target = folder.file("disk.out")
        func convert() throws {
            try image.convert(
                to: target, .raw, options: DiskConversion.Options(), bytesPerSecond: nil, stop: StopFlag()
            ) { _ in }
        }
        try convert()
        #expect(try Files.read(target) == Files.read(folder.file("made.raw")))
        try Files.writeAtomically([1, 2, 3], to: path)
        let damaged = failure { try convert() }
        #expect(damaged?.message.contains(path) == true && damaged?.message.contains("/proc") == false)
        try run("mv", path, folder.file("other.qcow2"))
        try run("ln", "-s", folder.file("other.qcow2"), path)
        #expect(failure { try convert() }?.message.contains("a link was put there") == true)
    }

    @Test func cancellingKillsIt() throws {
        let folder = try TemporaryFolder("work")
        try run("qemu-img", "create", "-f", "qcow2", folder.file("disk.qcow2"), "1G")
        let stop = StopFlag()
        stop.set()
        let image = QEMUImage(path: folder.file("disk.qcow2"), format: .qcow2)
        #expect(failure { _ = try image.info(stop: stop) }?.code == .cancelled)
    }
}
