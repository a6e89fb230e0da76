import Convert
import DiskImage
import HostKit
import MigrationModel
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
