import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct VMDKDescriptorTests {
    private func descriptor(
        type: String = "monolithicFlat", parent: String = "ffffffff", _ extents: String = "RW 8 FLAT \"a-flat.vmdk\" 0"
    ) -> [UInt8] {
        Array(
            "# Disk DescriptorFile\r\nversion=1\r\nparentCID=\(parent)\r\ncreateType=\"\(type)\"\r\n\(extents)\r\n".utf8
        )
    }

    private func folder() throws -> TemporaryFolder {
        let folder = try TemporaryFolder()
        _ = try folder.write([UInt8](repeating: 5, count: 4096), "a-flat.vmdk")
        return folder
    }

    private func open(_ folder: TemporaryFolder, _ bytes: [UInt8]) throws -> MigrationError? {
        let path = try folder.write(bytes, "a.vmdk")
        return failure { _ = try DiskFormat.vmdk.open(FileRegion(path: path)).contents() }
    }

    @Test(arguments: ["monolithicFlat", "twoGbMaxExtentFlat", "vmfs", "VMFS"])
    func flatKindsOpen(_ type: String) throws {
        let folder = try folder()
        #expect(try open(folder, descriptor(type: type)) == nil)
        #expect(try open(folder, descriptor(type: type, "RW 8 VMFS \"a-flat.vmdk\"")) == nil)
    }

    @Test(arguments: [
        ("monolithicSparse", "0a1b2c3d", MigrationError.Code.failedPrecondition, "snapshot"),
        ("seSparse", "ffffffff", .unimplemented, "seSparse"),
        ("vmfsSparse", "ffffffff", .unimplemented, "vmfsSparse"),
        ("vmfsRDM", "ffffffff", .unimplemented, "physical disk"),
        ("fullDevice", "ffffffff", .unimplemented, "physical disk"),
        ("vmfsPassthroughRawDeviceMap", "ffffffff", .unimplemented, "physical disk"),
        ("futureDisk", "ffffffff", .unimplemented, "futureDisk"), ("", "ffffffff", .unimplemented, "isn't read"),
    ])
    func otherKindsAreRefusedWithARemedy(
        _ type: String, _ parent: String, _ code: MigrationError.Code, _ text: String
    ) throws {
        let error = try #require(try open(try folder(), descriptor(type: type, parent: parent)))
        #expect(error.code == code)
        #expect(error.message.contains(text) && error.hint != nil, "\(error)")
    }

    @Test(arguments: [
        "RW 8 FLAT \"/etc/hostname\" 0", "RW 8 FLAT \"../a-flat.vmdk\" 0", "RW 8 FLAT \"sub/a-flat.vmdk\" 0",
        "RW 8 FLAT \"..\" 0", "RW 8 FLAT \".\" 0", "RW 8 FLAT \"\" 0", "RW 8 FLAT \"a\u{1}b\" 0",
        "RW 8 FLAT \"escape.vmdk\" 0", "RW 8 FLAT \"a.vmdk\" 0", "RW 1 SPARSE \"a.vmdk\"", "RW 8 FLAT \"fifo\" 0",
        "RW 8 FLAT \"sub\" 0", "RW 8 FLAT \"missing.vmdk\" 0", "RW 8 FLAT a-flat.vmdk 0", "RW 8 FLAT",
        "RW 0 FLAT \"a-flat.vmdk\" 0", "RW -8 FLAT \"a-flat.vmdk\" 0", "RW 9 FLAT \"a-flat.vmdk\" 0",
        "RW 8 FLAT \"a-flat.vmdk\" 1", "RW 8 FLAT \"a-flat.vmdk\" 18446744073709551615",
        "NOACCESS 8 FLAT \"a-flat.vmdk\"",
        "RW 18446744073709551615 FLAT \"a-flat.vmdk\" 0", "RW 9223372036854775808 ZERO", "RW 8 VMFSRDM \"a-flat.vmdk\"",
        "RW 8 SESPARSE \"a-flat.vmdk\"", "RW 8 SPARSE \"a-flat.vmdk\"", "RW 8 WHAT \"a-flat.vmdk\"", "",
    ])
    func badExtentsAreRefused(_ line: String) throws {
        let folder = try folder()
        try #require(symlink("/etc/hostname", "\(folder.path)/escape.vmdk") == 0)
        try #require(mkdir("\(folder.path)/sub", 0o755) == 0)
        try #require(mkfifo("\(folder.path)/fifo", 0o600) == 0)
        let error = try #require(try open(folder, descriptor(line)))
        #expect(error.message.contains(folder.path))
    }

    @Test func encryptedDisksAreRefused() throws {
        let lines = "RW 8 FLAT \"a-flat.vmdk\" 0\nddb.iofilters = \"vmwarevmcrypt\""
        #expect(try open(try folder(), descriptor(lines))?.code == .failedPrecondition)
    }

    @Test func sumOfExtentsIsLimited() throws {
        let lines = [String](repeating: "RW 2199023255552 ZERO", count: 3).joined(separator: "\n")
        #expect(try open(try folder(), descriptor(lines))?.code == .outOfRange)
    }

    @Test func linksWithinTheFolderAreFine() throws {
        let folder = try folder()
        try #require(symlink("a-flat.vmdk", "\(folder.path)/link.vmdk") == 0)
        #expect(try open(folder, descriptor("RW 8 FLAT \"link.vmdk\" 0")) == nil)
    }

    /// A path that was checked, where somebody puts a link afterwards.
    @Test(arguments: ["folder", "descriptor", "extent"]) func resolvedPathsAreNotFollowed(_ changed: String) throws {
        let place = try folder()
        let path = try Files.canonical(place.path)
        let disk = "\(path)/vm/disk.vmdk"
        try Files.createDirectories("\(path)/vm")
        try #require(rename("\(path)/a-flat.vmdk", "\(path)/vm/a-flat.vmdk") == 0)
        try Files.writeAtomically(descriptor("RW 8 FLAT \"a-flat.vmdk\" 0"), to: disk)
        let region = FileRegion(path: disk, isResolved: true)
        let opened = try DiskFormat.vmdk.open(region)
        #expect(try opened.contents().count == 4096)
        let name = ["folder": "\(path)/vm", "descriptor": disk, "extent": "\(path)/vm/a-flat.vmdk"][changed] ?? ""
        try #require(rename(name, "\(path)/moved") == 0)
        try #require(symlink("\(path)/moved", name) == 0)
        #expect(failure { _ = try DiskFormat.vmdk.open(region).contents() } != nil)
        // What was opened before reads its files through no link either.
        #expect(changed == "descriptor" || failure { _ = try opened.contents() }?.code == .failedPrecondition)
    }

    @Test func descriptorsInsideArchivesAreRefused() throws {
        let folder = try folder()
        let text = descriptor()
        let path = try folder.write([UInt8](repeating: 0, count: 512) + text, "a.ova")
        let region = FileRegion(path: path, offset: 512, length: UInt64(text.count))
        #expect(failure { _ = try DiskFormat.vmdk.open(region) }?.code == .unimplemented)
    }

    @Test func detectionNeverGuessesRaw() throws {
        let folder = try folder()
        #expect(throws: MigrationError.self) { try DiskFormat.detect(FileRegion(path: "\(folder.path)/a-flat.vmdk")) }
        #expect(try DiskFormat.detect(FileRegion(path: folder.write(descriptor(), "a.vmdk"))) == .vmdk)
    }
}
