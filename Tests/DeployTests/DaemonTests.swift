import Deploy
import FlotillaProtocol
import Foundation
import Glibc
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// Against a libvirtd with QEMU.
@Suite(.serialized, PrivateLibvirt()) struct DaemonTests {
    /// A boot sector that writes a line and a prompt to the first serial port, byte by byte, and halts.
    static let bootSector: [UInt8] = {
        var sector: [UInt8] = [
            0xbe, 0x22, 0x7c,  // mov si, 0x7c22
            0x31, 0xc0, 0x8e, 0xd8, 0xfc,  // xor ax, ax; mov ds, ax; cld
            0xac, 0x84, 0xc0, 0x74, 0x12,  // next: lodsb; test al, al; jz done
            0x88, 0xc3, 0xba, 0xfd, 0x03,  // mov bl, al; mov dx, 0x3fd
            0xec, 0xa8, 0x20, 0x74, 0xfb,  // wait: in al, dx; test al, 0x20; jz wait
            0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee,  // mov dx, 0x3f8; mov al, bl; out dx, al
            0xeb, 0xe9,  // jmp next
            0xf4, 0xeb, 0xfd,  // done: hlt; jmp done
        ]
        sector += Array("flotilla booted\r\n\u{1b}[1mdemo\u{1b}[0m login: ".utf8) + [0]
        sector += [UInt8](repeating: 0, count: 510 - sector.count) + [0x55, 0xaa]
        return sector
    }()

    private func smallVM(_ id: String, _ image: String) -> Manifest {
        linuxVM(id) {
            $0.vm.memory.bytes = 64 << 20
            $0.nics = []
            $0.disks[0].target.path = image
            $0.disks[0].target.format = "raw"
        }
    }

    @Test func aGuestBootsAndIsRemoved() throws {
        try withFolder { folder in
            let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
            let profile = try hostProfile(name: "here", connection: connection, pools: [])
            #expect(profile.hypervisor == "QEMU" && ["kvm", "qemu"].contains(profile.domainType))
            #expect(profile.domainType == "kvm" || !profile.domainTypeReason.isEmpty)

            let id = UUID().uuidString.lowercased()
            let deployment = Deployment(connection: connection, migrationID: id)
            try Files.writeAtomically(
                Self.bootSector + [UInt8](repeating: 0, count: (1 << 20) - 512), to: "\(folder)/disk.raw")
            for (guest, bus) in [
                ("debian12_64Guest", DiskBus.virtio), ("debian12_64Guest", .scsi), ("debian12_64Guest", .sataBus),
                ("winXPProGuest", .unspecified), ("winXPProGuest", .sataBus),
            ] {
                var manifest = smallVM(id, "\(folder)/disk.raw")
                manifest.vm.guestID = guest
                let options = mapped { ($0.domainName, $0.diskBus) = ("flotilla-daemon-test", bus) }
                var xml = DomainXML(manifest: manifest, options: options, host: profile)
                xml.consoleLog = "\(folder)/console.log"
                xml.bufferedDisks = disksWithoutDirectIO(manifest)
                let domain = try deployment.define(xml)
                defer { try? deployment.undefine(domain.name) }
                try domain.start()
                let line = try waitForConsole(
                    logPath: "\(folder)/console.log", pattern: "login: $", timeout: .seconds(60), stop: StopFlag(),
                    domainState: { try domain.state() }, progress: { _ in })
                #expect(line == "demo login: ")
                let silent = #expect(throws: MigrationError.self) {
                    try waitForAgent(domain, timeout: .milliseconds(1), stop: StopFlag()) { _ in }
                }
                #expect(silent?.code == .deadlineExceeded, "\(silent.map { "\($0)" } ?? "")")
                try deployment.undefine(domain.name)
                #expect(try connection.domain(named: "flotilla-daemon-test") == nil)
                try Files.remove("\(folder)/console.log")
            }
        }
    }

    /// A daemon that hangs keeps nobody waiting for ever.
    @Test func silentDaemonIsGivenUp() async throws {
        let connection = try LibvirtConnection(uri: PrivateLibvirt.uri, keepAlive: 1)
        _ = try connection.node()
        let told = Mutex<MigrationError?>(nil)
        try await PrivateLibvirt.paused {
            spawnThread("test") {
                let error = failure { try connection.node() }
                told.withLock { $0 = error }
            }
            let error = try await eventually(within: .seconds(20)) { told.withLock { $0 } }
            #expect(error?.code == .unavailable)
        }
        #expect(!connection.isAlive)
        _ = try LibvirtConnection(uri: PrivateLibvirt.uri).node()
    }

    @Test(arguments: [false, true]) func firmwareIsFound(_ secureBoot: Bool) throws {
        let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
        let profile = try hostProfile(name: "here", connection: connection, pools: [])
        guard secureBoot ? profile.secureBootFirmware : profile.efiFirmware else { return }
        let id = UUID().uuidString.lowercased()
        var manifest = smallVM(id, "/nonexistent.raw")
        (manifest.vm.firmware, manifest.vm.secureBoot) = (.efi, secureBoot)
        let deployment = Deployment(connection: connection, migrationID: id)
        let options = mapped { $0.domainName = "flotilla-firmware-test" }
        var xml = DomainXML(manifest: manifest, options: options, host: profile)
        xml.tpmEmulator = tpmEmulatorInstalled()
        let domain = try deployment.define(xml)
        defer { try? deployment.undefine(domain.name) }
        #expect(try domain.migrationID() == id)
        let error = #expect(throws: MigrationError.self) { try domain.start() }
        #expect(error?.message.contains("/nonexistent.raw") == true, "\(error?.message ?? "")")
    }

    @Test func aRenamedDomainIsNotTakenForNone() throws {
        let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
        let id = UUID().uuidString.lowercased()
        let deployment = Deployment(connection: connection, migrationID: id)
        let profile = try hostProfile(name: "here", connection: connection, pools: [])
        let xml = DomainXML(
            manifest: smallVM(id, "/nonexistent.raw"), options: mapped { $0.domainName = "before" }, host: profile)
        _ = try deployment.define(xml)
        let rename = { try run("/usr/bin/virsh", ["-c", PrivateLibvirt.uri, "domrename", $0, $1]).status }
        #expect(try rename("before", "after") == 0)
        let attempts: [() throws -> Void] = [
            { try deployment.undefine("before") }, { try deployment.shutDown("before", stop: StopFlag()) },
            { _ = try deployment.state(of: "before") }, { _ = try deployment.define(xml) },
        ]
        for attempt in attempts {
            let error = #expect(throws: MigrationError.self) { try attempt() }
            #expect(error?.code == .failedPrecondition && error?.message.contains("is called after now") == true)
        }
        #expect(try connection.domain(named: "after")?.migrationID() == id)
        #expect(try rename("after", "before") == 0)
        try deployment.undefine("before")
        #expect(try connection.domain(named: "after") == nil && connection.domain(named: "before") == nil)
    }

    /// As libguestfs makes them.
    @Test func transientDomainsAreNoneOfOurs() throws {
        try withFolder { folder in
            let text = """
                <domain type='qemu'><name>transient</name><memory unit='MiB'>32</memory>
                <os><type arch='x86_64' machine='q35'>hvm</type></os></domain>
                """
            try Files.writeAtomically(Array(text.utf8), to: "\(folder)/transient.xml")
            let virsh = { try run("/usr/bin/virsh", ["-c", PrivateLibvirt.uri] + $0) }
            let created = try virsh(["create", "--paused", "\(folder)/transient.xml"])
            #expect(created.status == 0, "\(created.output)")
            defer { _ = try? virsh(["destroy", "transient"]) }
            let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
            let profile = try hostProfile(name: "here", connection: connection, pools: [])
            let found = try #require(profile.domains.first { $0.name == "transient" })
            #expect(found.active && found.migrationID.isEmpty)
            #expect(try connection.deviceOwners().contains { $0.name == "transient" && $0.migration.isEmpty })
            #expect(try Deployment(connection: connection, migrationID: "m").find("none") == nil)
        }
    }

    /// QEMU's driver takes every golden domain, which libvirt's test driver does not judge.
    @Test(arguments: GoldenTests.cases) func isAccepted(_ test: GoldenTests.Case) throws {
        let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
        var domain = GoldenTests.domain(test, type: "qemu")
        domain.tpmEmulator = tpmEmulatorInstalled()
        let deployment = Deployment(connection: connection, migrationID: test.manifest.migrationID)
        let defined = try deployment.define(domain)
        #expect(try defined.xml().contains("flotilla:migration"))
        try deployment.undefine(defined.name)
    }

    /// The firmware's window for large registers passes libvirt by: QEMU must take it, and the firmware start with it.
    @Test func startsWithAFirmwareWindow() throws {
        try withFolder { folder in
            let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
            let profile = try hostProfile(name: "here", connection: connection, pools: [])
            try #require(profile.efiFirmware)
            let id = UUID().uuidString.lowercased()
            try Files.writeAtomically([UInt8](repeating: 0, count: 1 << 20), to: "\(folder)/disk.raw")
            var manifest = smallVM(id, "\(folder)/disk.raw")
            (manifest.vm.firmware, manifest.vm.memory.bytes) = (.efi, 256 << 20)
            var xml = DomainXML(manifest: manifest, options: mapped { $0.domainName = "window" }, host: profile)
            xml.devices = [[pci("0000:ca:00.0", bars: 128 << 30 + 32 << 20)]]
            xml.bufferedDisks = disksWithoutDirectIO(manifest)
            let deployment = Deployment(connection: connection, migrationID: id)
            let domain = try deployment.define(xml)
            defer { try? deployment.undefine("window") }
            #expect(try domain.xml().contains("name=opt/ovmf/X-PciMmio64Mb,string=262144"))

            // There is no such card here: the rest of the document, as it is.
            var text = try domain.xml()
            let start = try #require(text.range(of: "<hostdev")).lowerBound
            text.removeSubrange(start..<(try #require(text.range(of: "</hostdev>")).upperBound))
            try Files.writeAtomically(Array(text.utf8), to: "\(folder)/window.xml")
            let virsh = { try run("/usr/bin/virsh", ["-c", PrivateLibvirt.uri] + $0) }
            let defined = try virsh(["define", "\(folder)/window.xml"])
            #expect(defined.status == 0, "\(defined.output)")
            try domain.start()
            let memory = try virsh(["qemu-monitor-command", "window", "--hmp", "info mtree -f"])
            #expect(try domain.state() == .running && memory.status == 0, "\(memory.output)")
            let arguments = try Files.list("/proc").filter { Int32($0) != nil }.compactMap {
                try? String(decoding: Files.read("/proc/\($0)/cmdline"), as: UTF8.self)
            }
            #expect(arguments.contains { $0.contains("guest=window") && $0.contains("X-PciMmio64Mb,string=262144") })
        }
    }

    /// It is worth trying again, with another connection: neither the first call that finds it gone nor a later one is the
    /// end of a deploy.
    @Test func aRestartedDaemonIsUnavailableToOldConnections() throws {
        signal(SIGPIPE, SIG_IGN)  // as the program does: libvirt writes to the socket that is gone
        let connection = try LibvirtConnection(uri: PrivateLibvirt.uri)
        #expect(try connection.domain(named: "nobody") == nil)
        try PrivateLibvirt.restart()
        for _ in 1...2 {
            #expect(failure { try connection.domain(named: "nobody") }?.code == .unavailable)
        }
        #expect(try LibvirtConnection(uri: PrivateLibvirt.uri).domain(named: "nobody") == nil)
    }
}
