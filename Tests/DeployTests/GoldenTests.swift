import Deploy
import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import SwiftProtobuf
import Testing

/// Every kind of domain against a committed document. `FLOTILLA_UPDATE_GOLDEN=1` rewrites them.
@Suite struct GoldenTests {
    struct Case: Sendable, CustomTestStringConvertible {
        var testDescription: String
        var manifest = linuxVM()
        var options = mapped()
        var domainType = "kvm"
        var devices: [[PciFunction]] = []
        var vgpus: [DomainVgpu] = []
        var bufferedDisks: Set<String> = []
        var consoleLog: String?
    }

    static let windows: @Sendable (inout Manifest) -> Void = {
        $0.vm.guestID = "windows2019srv_64Guest"
        $0.vm.firmware = .efi
        $0.vm.secureBoot = true
        $0.vm.tpm = true
    }

    static let cases: [Case] = [
        Case(testDescription: "bios"),
        Case(
            testDescription: "efi-emulated", manifest: linuxVM { $0.vm.firmware = .efi },
            options: mapped { $0.keepUuid = true },
            domainType: "qemu", consoleLog: "/var/log/flotilla/demo-web.console"),
        Case(
            testDescription: "secureboot-tpm",
            manifest: linuxVM { ($0.vm.firmware, $0.vm.secureBoot, $0.vm.tpm) = (.efi, true, true) }),
        Case(testDescription: "windows", manifest: linuxVM { windows(&$0) }),
        Case(
            testDescription: "windows-hidden-virtio",
            manifest: linuxVM {
                windows(&$0)
                $0.vm.hypervisorHidden = true
                $0.vm.clockUtc = true
            }, options: mapped { $0.diskBus = .virtio }),
        Case(
            testDescription: "windows-xp",
            manifest: linuxVM {
                $0.vm.guestID = "winXPProGuest"
                $0.disks = [disk(0, .ide), disk(1, .ide)]
            }),
        Case(
            testDescription: "linux-2.4-sata", manifest: linuxVM { $0.vm.guestID = "other24xLinuxGuest" },
            options: mapped { $0.diskBus = .sataBus }),
        Case(
            testDescription: "two-nics",
            manifest: linuxVM {
                $0.nics.append(.with { ($0.id, $0.mac, $0.network) = ("nic1", "00:50:56:0A:0B:0C", "Storage") })
                $0.vm.bootOrder = ["cdrom", "net:ethernet1", "disk:scsi0:0", "floppy", "net:ethernet1"]
            }),
        Case(
            testDescription: "scsi-many",
            manifest: linuxVM { manifest in
                manifest.disks = (0..<9).map { disk($0, .lsiLogicSas) }
                manifest.disks[3].boot = true
            }, options: mapped { $0.diskBus = .scsi }),
        Case(
            testDescription: "gpu-audio", manifest: linuxVM { ($0.vm.firmware, $0.vm.hypervisorHidden) = (.efi, true) },
            devices: [[pci("0000:86:00.0"), pci("0000:86:00.1")], [pci("10000:e1:00.1")]]),
        // 80 GB behind a register of 128 GiB, on the second node, with the firmware's window.
        Case(
            testDescription: "a100-efi",
            manifest: linuxVM { ($0.vm.firmware, $0.vm.secureBoot, $0.vm.memory.bytes) = (.efi, true, 128 << 30) },
            devices: [[pci("0000:ca:00.0", bars: 128 << 30 + 32 << 20, node: 1)]]),
        Case(
            testDescription: "a100-bios-hugepages", options: mapped { ($0.hugepages, $0.hideRom) = (true, true) },
            devices: [
                [pci("0000:3b:00.0", bars: 128 << 30 + 32 << 20, node: 0)],
                [pci("0000:ca:00.0", bars: 128 << 30 + 32 << 20, node: 1)],
            ]),
        Case(
            testDescription: "t4-mdev", manifest: linuxVM { $0.vm.firmware = .efi },
            vgpus: [.mdev(uuid: "11111111-2222-8333-8444-555555555555", on: pci("0000:5e:00.0", node: 1))]),
        Case(
            testDescription: "l40s-vendor-windows", manifest: linuxVM { windows(&$0) },
            vgpus: [.function(pci("0000:3b:00.4", bars: 32 << 30, node: 0))]),
        Case(
            testDescription: "h100-mig", manifest: linuxVM { $0.vm.firmware = .efi },
            vgpus: [.function(pci("0000:4e:00.4", node: 1)), .function(pci("0000:4e:00.5", node: 1))]),
        Case(
            testDescription: "raw-buffered", manifest: linuxVM { $0.disks = [disk(0, .sata, format: "raw")] },
            bufferedDisks: ["disk0"]),
        Case(
            testDescription: "hostile",
            manifest: linuxVM {
                $0.vm.name = "]]><evil a='\"'>&\u{1}\u{0}\n" + String(repeating: "n", count: 1000)
                $0.vm.annotation = "]]></description><x/>\u{8}\u{FFFE}\r\n&amp; ünï\u{85}🚀"
                $0.nics[0].network = "a\"b<"
            },
            options: .with {
                $0.networks = [.with { ($0.source, $0.network) = ("a\"b<", "net\"'<>&") }]
            }),
    ]

    static func domain(_ test: Case, type: String? = nil) -> DomainXML {
        var domain = DomainXML(manifest: test.manifest, options: test.options, host: host(type ?? test.domainType))
        domain.devices = test.devices
        domain.vgpus = test.vgpus
        domain.numaNodes = twoNodes
        domain.bufferedDisks = test.bufferedDisks
        domain.consoleLog = test.consoleLog
        return domain
    }

    @Test(arguments: cases) func matchesItsDocument(_ test: Case) throws {
        let text = try Self.domain(test).text()
        let folder = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "Golden")
        let path = folder.appending(path: "\(test.testDescription).xml").path
        if ProcessInfo.processInfo.environment["FLOTILLA_UPDATE_GOLDEN"] != nil {
            try Files.writeAtomically(Array(text.utf8), to: path, mode: 0o644)
        }
        let golden = String(decoding: try Files.read(path), as: UTF8.self)
        #expect(text == golden)
    }

    @Test(arguments: cases) func followsLibvirtsSchema(_ test: Case) throws {
        try withFolder { folder in
            let path = "\(folder)/domain.xml"
            try Files.writeAtomically(Array(try Self.domain(test).text().utf8), to: path)
            let result = try run("/usr/bin/virt-xml-validate", [path, "domain"])
            #expect(result.status == 0, "\(result.output)")
        }
    }

    @Test(arguments: cases) func isAcceptedByLibvirt(_ test: Case) throws {
        var test = test
        test.manifest.migrationID = UUID().uuidString.lowercased()
        test.options.keepUuid = false
        test.options.domainName = "golden-\(test.testDescription)"
        let deployment = Deployment(
            connection: try LibvirtConnection(uri: "test:///default"), migrationID: test.manifest.migrationID)
        let domain = try deployment.define(Self.domain(test, type: "test"))
        defer { try? deployment.undefine(domain.name) }
        #expect(try domain.migrationID() == test.manifest.migrationID)
        #expect(try domain.state() == .shutOff)
    }

    @Test func theDigestIsTheManifests() throws {
        let manifest = linuxVM { $0.extraConfig = ["b": "2", "a": "1", "c": "3"] }
        let digest = try manifestDigest(manifest)
        let copy = try Manifest(jsonString: manifest.jsonString())
        let again = try manifestDigest(copy)
        #expect(digest.count == 64 && again == digest)
        #expect(try DomainXML(manifest: manifest, options: mapped(), host: host()).text().contains(digest))
    }

    @Test(arguments: [
        ("no memory", linuxVM { $0.vm.memory.bytes = 0 }, mapped(), "no memory size"),
        ("no image", linuxVM { $0.disks[0].clearTarget() }, mapped(), "no converted image"),
        ("relative image", linuxVM { $0.disks[0].target.path = "x.qcow2" }, mapped(), "no converted image"),
        ("strange format", linuxVM { $0.disks[0].target.format = "vmdk" }, mapped(), "no converted image"),
        (
            "too many for IDE",
            linuxVM { ($0.vm.guestID, $0.disks) = ("winNetEnterpriseGuest", (0..<5).map { disk($0, .ide) }) }, mapped(),
            "gets IDE, which holds 4"
        ),
        ("unmapped", linuxVM { $0.nics[0].network = "Other" }, mapped(), "mapped to nothing"),
        ("multicast", linuxVM { $0.nics[0].mac = "01:00:5e:00:00:01" }, mapped(), "not a NIC's MAC"),
        ("bad MAC", linuxVM { $0.nics[0].mac = "00:50:56" }, mapped(), "not a NIC's MAC"),
        ("bad UUID", linuxVM { $0.vm.biosUuid = "56 4d" }, mapped { $0.keepUuid = true }, "not a UUID"),
        ("bad name", linuxVM(), mapped { $0.domainName = "a/b" }, "can't be a domain's name"),
        ("no migration", linuxVM(""), mapped(), "no migration id"),
    ])
    func refuses(_ name: String, _ manifest: Manifest, _ options: DeployOptions, _ message: String) {
        let error = #expect(throws: MigrationError.self) {
            try DomainXML(manifest: manifest, options: options, host: host()).text()
        }
        #expect(error?.message.contains(message) == true, "\(name): \(error?.message ?? "")")
    }

    /// GiB of large and of small registers for each device; each is behind a port of its own.
    @Test(
        arguments: [
            ([], nil), ([16], nil), ([8, 4, 2], nil), ([16, 8], 64), ([16, 16], 64), ([32], 64), ([64], 128),
            ([128], 256),
            ([128, 128, 128], 1024), ([32, 32, 32], 256), ([8, 8, 8], 64), ([8, 8], nil),
            ([64, 64, 64, 64, 64], 1024),
        ] as [([UInt64], UInt64?)])
    func windowsForLargeRegisters(_ sizes: [UInt64], _ window: UInt64?) {
        var xml = DomainXML(manifest: linuxVM(), options: mapped(), host: host())
        xml.devices = sizes.enumerated().map { [pci("0000:0\($0):00.0", bars: $1 << 30 + 32 << 20)] }
        #expect(xml.largeWindow == window.map { $0 << 30 })
    }

    /// Where libvirt can say so: of a window beyond 1 TiB QEMU says "phys-bits too low (40)" else.
    @Test(arguments: [("", true), ("8.0.0", false), ("8.6.9", false), ("8.7.0", true), ("10.0.0", true)])
    func widthOfAddresses(_ version: String, _ isTold: Bool) throws {
        var host = host()
        host.libvirtVersion = version
        var xml = DomainXML(manifest: linuxVM(), options: mapped(), host: host)
        #expect(try !xml.text().contains("maxphysaddr"))
        xml.devices = (1...8).map { [pci("0000:0\($0):00.0", bars: 128 << 30 + 32 << 20)] }
        #expect(try xml.text().contains("<maxphysaddr mode=\"passthrough\"/>") == isTold)
        host.domainType = "qemu"
        xml = DomainXML(manifest: linuxVM(), options: mapped(), host: host)
        xml.devices = [[pci("0000:01:00.0", bars: 128 << 30)]]
        #expect(try !xml.text().contains("maxphysaddr"))
    }

    @Test func lettersDisks() {
        let manifest = linuxVM { $0.disks = (0..<28).map { disk($0, .pvscsi) } }
        let text = try? DomainXML(manifest: manifest, options: mapped(), host: host()).text()
        for name in ["vda", "vdz", "vdaa", "vdab"] { #expect(text?.contains("dev=\"\(name)\"") == true) }
    }
}
