import Deploy
import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import Testing

@Suite struct LibvirtTests {
    @Test(arguments: [
        ("qemu+ssh://root@kvm2/system", MigrationError.Code.failedPrecondition, "names a remote server"),
        ("qemu+tcp:///system", .failedPrecondition, "names a remote server"),
        ("qemu://kvm2/system", .failedPrecondition, "names a remote server"),
        ("qemu+unix://kvm2/system", .failedPrecondition, "names a remote server"),
        ("esx://vcenter/", .invalidArgument, "only QEMU"),
        ("qemu", .invalidArgument, "not a libvirt URI"),
        ("", .invalidArgument, "not a libvirt URI"),
        ("qemu:///system?socket=/nonexistent/libvirt-sock", .unavailable, "/nonexistent/libvirt-sock"),
        ("test:///nonexistent.xml", .unavailable, "libvirt:"),
    ])
    func refusesConnections(_ uri: String, _ code: MigrationError.Code, _ message: String) {
        let error = #expect(throws: MigrationError.self) { try LibvirtConnection(uri: uri) }
        #expect(error?.code == code && error?.hint != nil)
        #expect(error?.message.contains(message) == true, "\(error?.message ?? "")")
    }

    @Test func aDomainsLife() throws {
        let connection = try LibvirtConnection(uri: "test:///default")
        let id = UUID().uuidString.lowercased()
        let deployment = Deployment(connection: connection, migrationID: id)
        var xml = DomainXML(manifest: linuxVM(id), options: mapped { $0.domainName = "life" }, host: host("test"))
        #expect(try connection.domain(named: "life") == nil)
        let domain = try deployment.define(xml)
        #expect(try domain.uuid() == xml.uuid())
        #expect(try domain.state().description == "shut off")

        // A repeated deploy redefines it, with what changed.
        xml.manifest.vm.memory.bytes = 8 << 30
        _ = try deployment.define(xml)
        #expect(try domain.xml().contains("<memory unit='KiB'>8388608</memory>"))

        try domain.start()
        try domain.start()
        #expect(try domain.state() == .running)
        _ = try deployment.define(xml)
        #expect(try domain.state() == .running)

        // Another choice of UUID: refused while it runs, replaced when shut off.
        var kept = xml
        kept.options.keepUuid = true
        kept.manifest.vm.biosUuid = UUID().uuidString
        #expect(throws: MigrationError.self) { try deployment.define(kept) }
        try deployment.undefine("life")
        #expect(try connection.domain(named: "life") == nil)
        _ = try deployment.define(xml)
        let replaced = try deployment.define(kept)
        #expect(try replaced.uuid() == kept.manifest.vm.biosUuid.lowercased())

        try deployment.undefine("life")
        try deployment.undefine("life")
        #expect(try connection.domain(named: "life") == nil)
    }

    @Test func foreignDomainsAreLeftAlone() throws {
        let connection = try LibvirtConnection(uri: "test:///default")
        let owner = Deployment(connection: connection, migrationID: UUID().uuidString)
        let other = Deployment(connection: connection, migrationID: UUID().uuidString)
        let options = mapped { $0.domainName = "foreign" }
        let domain = try owner.define(
            DomainXML(manifest: linuxVM(owner.migrationID), options: options, host: host("test")))
        defer { try? owner.undefine("foreign") }
        let intruder = DomainXML(manifest: linuxVM(other.migrationID), options: options, host: host("test"))
        for attempt in [{ _ = try other.define(intruder) }, { try other.undefine("foreign") }] {
            let error = #expect(throws: MigrationError.self) { try attempt() }
            #expect(error?.code == .alreadyExists)
            #expect(error?.message.contains("belongs to migration \(owner.migrationID)") == true)
        }
        #expect(try domain.migrationID() == owner.migrationID)

        // The test driver's own domain has no metadata at all.
        let error = #expect(throws: MigrationError.self) { try other.undefine("test") }
        #expect(error?.message.contains("was not made by a migration") == true)
        #expect(throws: MigrationError.self) { try owner.define(intruder) }
    }

    @Test func aTakenUUIDIsRefused() throws {
        let connection = try LibvirtConnection(uri: "test:///default")
        let taken = try #require(try connection.domain(named: "test")).uuid()
        let id = UUID().uuidString
        let manifest = linuxVM(id) { $0.vm.biosUuid = taken }
        let options = mapped { ($0.domainName, $0.keepUuid) = ("refused", true) }
        let error = #expect(throws: MigrationError.self) {
            try Deployment(connection: connection, migrationID: id)
                .define(DomainXML(manifest: manifest, options: options, host: host("test")))
        }
        #expect(error?.code == .alreadyExists && error?.message.contains("domain test already has the UUID") == true)
    }

    @Test func libvirtsWordsReachTheUser() throws {
        let connection = try LibvirtConnection(uri: "test:///default")
        let id = UUID().uuidString
        // Host devices that no schema knows.
        var xml = DomainXML(manifest: linuxVM(id), options: mapped { $0.domainName = "refused" }, host: host("weird"))
        xml.devices = [[pci("0000:3b:00.0")]]
        let error = #expect(throws: MigrationError.self) {
            try Deployment(connection: connection, migrationID: id).define(xml)
        }
        #expect(error?.code == .invalidArgument)
        #expect(error?.message.contains("define domain refused: libvirt: ") == true, "\(error?.message ?? "")")
    }

    @Test func theAgentOfAStoppedDomain() throws {
        let connection = try LibvirtConnection(uri: "test:///default")
        let id = UUID().uuidString
        let deployment = Deployment(connection: connection, migrationID: id)
        let domain = try deployment.define(
            DomainXML(manifest: linuxVM(id), options: mapped { $0.domainName = "agent" }, host: host("test")))
        defer { try? deployment.undefine("agent") }
        let stopped = #expect(throws: MigrationError.self) {
            try waitForAgent(domain, timeout: .seconds(5), stop: StopFlag()) { _ in }
        }
        #expect(stopped?.code == .failedPrecondition && stopped?.message.contains("shut off") == true)
        try domain.start()
        let unsupported = #expect(throws: MigrationError.self) {
            try waitForAgent(domain, timeout: .seconds(5), stop: StopFlag()) { _ in }
        }
        #expect(unsupported?.code == .unimplemented)
        let stop = StopFlag()
        stop.set()
        let cancelled = #expect(throws: MigrationError.self) {
            try waitForAgent(domain, timeout: .seconds(5), stop: stop) { _ in }
        }
        #expect(cancelled?.code == .cancelled)
    }

    @Test func profilesAHost() throws {
        try withFolder { folder in
            let connection = try LibvirtConnection(uri: "test:///default")
            let id = UUID().uuidString
            let deployment = Deployment(connection: connection, migrationID: id)
            var xml = DomainXML(
                manifest: linuxVM(id), options: mapped { $0.domainName = "profiled" }, host: host("test"))
            xml.devices = [[pci("0000:3b:00.0")]]
            let domain = try deployment.define(xml)
            defer { try? deployment.undefine("profiled") }

            for path in ["class/net/br7/bridge", "class/net/eth0", "class/iommu/dmar0", "kernel/iommu_groups/1"] {
                try Files.createDirectories("\(folder)/sys/\(path)")
            }
            for address in ["0000:3b:00.0", "0000:3c:00.0"] {
                try Files.createDirectories("\(folder)/sys/bus/pci/devices/\(address)")
            }
            try Files.createDirectories("\(folder)/pool")
            let profile = try hostProfile(
                name: "kvm1", connection: connection,
                pools: [
                    PoolFolder(name: "main", path: "\(folder)/pool"), PoolFolder(name: "gone", path: "\(folder)/gone"),
                ],
                devices: DeviceHost(sysfs: Sysfs(root: "\(folder)/sys"), folder: "\(folder)/gpu"),
                proc: "\(folder)/proc")
            #expect(profile.hypervisor == "TEST" && profile.domainType == "test" && !profile.domainTypeReason.isEmpty)
            #expect(profile.libvirtVersion.split(separator: ".").count == 3 && profile.libvirtUri == "test:///default")
            #expect(profile.cpus > 0 && profile.memoryBytes > 0 && profile.networks.contains("default"))
            #expect(profile.bridges == ["br7"] && profile.iommuEnabled && profile.capturedAt.seconds > 1_600_000_000)
            #expect(profile.pools[0].writable && profile.pools[0].freeBytes > 0 && profile.pools[0].problem.isEmpty)
            #expect(!profile.pools[1].writable && profile.pools[1].problem.contains("No such file"))
            #expect(try Files.list("\(folder)/pool").isEmpty)
            let summary = try #require(profile.domains.first { $0.name == "profiled" })
            #expect(try summary.uuid == domain.uuid() && summary.migrationID == id && !summary.active)
            #expect(profile.pciFunctions.map(\.inUseBy) == ["domain profiled", ""])
        }
    }

    @Test func placementIsJudgedOnTheHost() throws {
        try withFolder { folder in
            let manifest = linuxVM {
                $0.vm.tpm = true
                $0.disks[0].target.path = "\(folder)/disk.raw"
            }
            try Files.writeAtomically([0], to: "\(folder)/disk.raw")
            #expect(disksWithoutDirectIO(manifest).isSubset(of: ["disk0"]))
            #expect(disksWithoutDirectIO(linuxVM()).isEmpty)
            var domain = DomainXML(manifest: manifest, options: mapped(), host: host())
            #expect(placementFindings(domain).isEmpty)
            #expect(!tpmEmulatorInstalled(in: [folder]))
            domain.bufferedDisks = ["disk0"]
            domain.tpmEmulator = false
            let findings = placementFindings(domain)
            #expect(findings.map(\.subject) == ["disk0", "vm"] && findings[1].message.contains("no swtpm"))
            #expect(try !domain.text().contains("<tpm"))
            try Files.writeAtomically([], to: "\(folder)/swtpm")
            #expect(tpmEmulatorInstalled(in: [folder]))
        }
    }
}
