import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Export

@Suite struct VMXRefusalTests {
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let lines: String
        var code = MigrationError.Code.invalidArgument
        let says: String

        init(_ lines: String, _ says: String, _ code: MigrationError.Code = .invalidArgument) {
            (testDescription, self.lines, self.says, self.code) = (lines, lines, says, code)
        }
    }

    static let cases = [
        Case("encryption.keySafe = \"vmware:key/list\"", "encrypted", .failedPrecondition),
        Case(".encoding = \"Shift_JIS\"", "Shift_JIS", .unimplemented),
        Case("numvcpus = \"4\"\nNUMVCPUS = \"8\"", "line 4: NUMVCPUS is already set"),
        Case("no equals sign", "line 3"),
        Case("a = \"open", "closing quote"),
        Case("a = \"x\" y", "after its value"),
        Case("a = \"|2\"", "escape"),
        Case("a = \"|zz\"", "escape"),
        Case("a = \"|00\"", "escape"),
        Case(" = \"x\"", "usable key"),
        Case("firmware = \"coreboot\"", "neither bios nor efi"),
        Case("numvcpus = \"-1\"", "not a number"),
        Case("numvcpus = \"0\"", "not between"),
        Case("cpuid.coresPerSocket = \"0\"", "not between"),
        Case("sched.mem.min = \"99999999999999\"", "2^63"),
        Case("vcpu.hotadd = \"maybe\"", "neither TRUE nor FALSE"),
        Case("uuid.bios = \"12 34\"", "not a UUID"),
        Case("scsi0:0.fileName = \"/vmfs/volumes/other/d.vmdk\"", "absolute path"),
        Case("scsi0:0.fileName = \"../other/d.vmdk\"", "leads out"),
        Case("scsi0:0.fileName = \"C:\\VMs\\d.vmdk\"", "backslash"),
        Case("scsi0:0.fileName = \"gone.vmdk\"", "gone.vmdk", .notFound),
        Case("scsi0:0.fileName = \"link.vmdk\"", "link that leaves", .permissionDenied),
        Case("scsi0:0.fileName = \"noise.vmdk\"", "not a VMDK"),
        Case("scsi0:0.fileName = \"loop.vmdk\"", "leads back"),
        Case("scsi0:0.fileName = \"orphan.vmdk\"", "nowhere.vmdk", .notFound),
        Case("scsi0:0.fileName = \"nameless.vmdk\"", "doesn't name"),
        Case("scsi0:0.fileName = \"far.vmdk\"", "absolute path"),
        Case("scsi0:0.fileName = \"huge.vmdk\"", "2^63"),
        Case("scsi0:0.fileName = \"zero.vmdk\"", "0 bytes"),
        Case("scsi0:0.present = \"TRUE\"", "no fileName"),
        Case("scsi0:0.fileName = \"good.vmdk\"\nscsi0:1.fileName = \"good.vmdk\"", "same file"),
        Case("scsi0:0.fileName = \"good.vmdk\"\nscsi0:0.mode = \"odd\"", "disk mode"),
        Case("scsi0:0.fileName = \"good.vmdk\"\nscsi0.virtualDev = \"odd\"", "SCSI controller"),
        Case("ethernet0.address = \"zz\"", "not a MAC"),
        Case(
            "ethernet0.address = \"00:50:56:00:00:01\"\nethernet1.address = \"00:50:56:00:00:01\"",
            "nic0 and nic1 have the same MAC"),
    ]

    @Test(arguments: cases) func refused(_ example: Case) throws {
        let folder = try TemporaryFolder()
        let outside = try TemporaryFolder()
        try outside.write("d.vmdk", Image.sparse(sectors: 16))
        symlink(outside.path + "/d.vmdk", folder.path + "/link.vmdk")
        try folder.write("good.vmdk", Image.sparse(sectors: 16))
        try folder.write("noise.vmdk", [UInt8](repeating: 0xaa, count: 4096))
        for (name, hint) in [
            ("loop", "loop.vmdk"), ("orphan", "nowhere.vmdk"), ("nameless", nil), ("far", "/a/b.vmdk"),
        ] {
            try folder.write(
                "\(name).vmdk",
                Image.descriptor(createType: "vmfsSparse", parent: "1234abcd", hint: hint, extents: ["RW 8 ZERO"]))
        }
        try folder.write(
            "huge.vmdk", Image.descriptor(createType: "vmfs", extents: ["RW \(UInt64.max) ZERO", "RW 1 ZERO"]))
        try folder.write("zero.vmdk", Image.descriptor(createType: "vmfs", extents: []))
        try folder.write("a.vmx", "displayName = \"a\"\nmemsize = \"64\"\n\(example.lines)\n")
        let error = try #require(failure { try folder.capture("vmx", "a.vmx") })
        #expect(error.code == example.code && error.message.contains(example.says), "\(error)")
    }

    @Test func pipesAndFoldersAreNotOpened() throws {
        let folder = try TemporaryFolder()
        mkfifo(folder.path + "/p.vmx", 0o600)
        #expect(failure { try folder.capture("vmx", "p.vmx") }?.message.contains("regular file") == true)
        #expect(
            failure {
                try captureManifest(from: SourceURL(parsing: "ova:\(folder.path)"), vmName: nil, stop: StopFlag())
            } != nil)
        mkfifo(folder.path + "/d.vmdk", 0o600)
        try folder.write("a.vmx", "displayName = \"a\"\nmemsize = \"64\"\nscsi0:0.fileName = \"d.vmdk\"\n")
        #expect(failure { try folder.capture("vmx", "a.vmx") }?.message.contains("regular file") == true)
    }

    @Test func repeatedEqualLinesAreFine() throws {
        let file = try VMXFile(Array("a = \"1\"\nA = \"1\"\nb = 2 \r\n# c\n\n".utf8), name: "x")
        #expect(file.entries.count == 2 && file["B"] == "2")
    }
}
