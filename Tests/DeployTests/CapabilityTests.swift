import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Deploy

@Suite struct CapabilityTests {
    @Test func whomQEMURunsAs() throws {
        func user(_ models: String) -> [UInt32]? {
            qemuUser(inCapabilities: "<capabilities><host>\(models)</host></capabilities>").map { [$0.user, $0.group] }
        }
        let dac = """
            <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+109</baselabel>
            <baselabel type='qemu'>+64055:+109</baselabel></secmodel>
            """
        #expect(user("<secmodel><model>apparmor</model><doi>0</doi></secmodel>" + dac) == [64055, 109])
        #expect(user("<secmodel><model>dac</model><doi>0</doi></secmodel>") == nil && user("") == nil)
        #expect(qemuUser(inCapabilities: "no XML") == nil)

        let folder = try TemporaryFolder("open/closed/pool")
        let pool = "\(folder.path)/open/closed/pool"
        let nobody: (uid_t, gid_t) = (65534, 65534)
        for path in [folder.path, "\(folder.path)/open", pool] { try #require(chmod(path, 0o755) == 0) }
        try #require(chmod("\(folder.path)/open/closed", 0o700) == 0)
        // Only root may ask for others.
        #expect(folderClosed(to: nobody, on: pool) == (geteuid() == 0 ? "\(folder.path)/open/closed" : nil))
        #expect(folderClosed(to: (0, 0), on: pool) == nil)
        try #require(chmod("\(folder.path)/open/closed", 0o711) == 0)
        #expect(folderClosed(to: nobody, on: pool) == nil)
    }

    @Test(arguments: [
        (
            "<enum name='firmware'><value>bios</value><value>efi</value></enum>", "<value>yes</value><value>no</value>",
            true, true
        ),
        ("<enum name='firmware'><value>bios</value><value>efi</value></enum>", "<value>no</value>", true, false),
        ("<enum name='firmware'><value>bios</value></enum>", "<value>yes</value>", false, false),
        ("", "", false, false),
    ])
    func readsFirmware(_ firmware: String, _ secure: String, _ efi: Bool, _ secureBoot: Bool) throws {
        let document =
            "<domainCapabilities><os supported='yes'>\(firmware)<loader supported='yes'><enum name='secure'>\(secure)</enum>"
            + "</loader></os></domainCapabilities>"
        let found = try DomainCapabilities(document)
        #expect(found.efi == efi && found.secureBoot == secureBoot)
        #expect(throws: MigrationError.self) { try DomainCapabilities("<os") }
    }

    @Test(arguments: [
        ("flags\t\t: fpu vmx sse\n", true), ("flags\t\t: fpu svm\n", true), ("flags\t\t: fpu sse\nbugs: vmx\n", false),
        ("flags\t\t: avmx svm_lock\n", false), ("", false),
    ])
    func readsTheCPU(_ text: String, _ expected: Bool) throws {
        try withFolder { folder in
            try Files.writeAtomically(Array(text.utf8), to: "\(folder)/cpuinfo")
            #expect(cpuHasVirtualization(folder) == expected)
        }
    }

    @Test func readsAssignedDevices() throws {
        let xml = """
            <domain><devices>
            <controller type='pci' index='0'/><disk type='file'><source file='x'/></disk>
            <hostdev mode='subsystem' type='pci'><source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source>
            <address type='pci' bus='0x01'/></hostdev>
            <interface type='hostdev'><source><address type='pci' domain='0x0001' bus='0x05' slot='0x1f' function='0x7'/></source></interface>
            <hostdev mode='subsystem' type='usb'><source><address bus='1' device='2'/></source></hostdev>
            <disk type='nvme' device='disk'><source type='pci' managed='yes' namespace='1'>
            <address domain='0x0000' bus='0x5e' slot='0x00' function='0x0'/></source>
            <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/></disk>
            <disk type='file'><source file='/x'/><backingStore type='nvme'><source type='pci' namespace='1'>
            <address domain='0x0000' bus='0x5f' slot='0x00' function='0x0'/></source></backingStore></disk>
            </devices></domain>
            """
        #expect(
            try assignedAddresses(xml, of: "x") == ["0000:3b:00.1", "0001:05:1f.7", "0000:5e:00.0", "0000:5f:00.0"])
    }

    @Test func readsBlockDevices() throws {
        let xml = """
            <domain><devices>
            <disk type='block'><source dev='/dev/disk/by-id/nvme-A'/><target dev='vda'/></disk>
            <disk type='file'><source file='/pool/x'/><backingStore type='block'><source dev='/dev/sdb2'/></backingStore>
            <mirror type='block'><source dev='/dev/sdc'/></mirror></disk>
            <disk type='file'><source file='/dev/sdd'/></disk><disk type='volume'><source pool='a' volume='b'/></disk>
            <interface type='direct'><source dev='/dev/eth0'/></interface>
            </devices></domain>
            """
        #expect(
            try blockDevices(xml, of: "x") == ["/dev/disk/by-id/nvme-A", "/dev/sdb2", "/dev/sdc", "/dev/sdd"])
    }

    @Test func ownersReplaceTheirProcess() {
        var functions: [PciFunction] = [
            .with { ($0.address, $0.iommuGroup, $0.inUseBy) = ("a", 1, "process 7 (qemu)") },
            .with { ($0.address, $0.iommuGroup, $0.inUseBy) = ("b", 1, "process 7 (qemu)") },
            .with { ($0.address, $0.iommuGroup, $0.inUseBy) = ("c", 2, "process 8 (qemu)") },
            .with { ($0.address, $0.iommuGroup) = ("d", 3) },
            .with { ($0.address, $0.iommuGroup) = ("e", 3) },
        ]
        claim(&functions, ["a": "web", "d": "off"])
        #expect(functions.map(\.inUseBy) == ["domain web", "domain web", "process 8 (qemu)", "domain off", ""])
    }

    @Test func escapes() throws {
        var writer = XMLWriter()
        writer.element("a", ["b": "\"<>&\n\t\r'\u{1}"], text: "]]>\u{0}\u{FFFF}\n\r<")
        let tree = try XMLTree.parse(writer.text, of: "test")
        #expect(tree.attributes["b"] == "\"<>&\n\t\r'" && tree.text == "]]>\n\r<")
    }
}
