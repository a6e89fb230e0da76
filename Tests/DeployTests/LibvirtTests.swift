import Deploy
import FlotillaProtocol
import Foundation
import Glibc
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

    /// The kernel takes the connection, and nobody ever answers.
    @Test func aDaemonThatStandsStillIsGivenUp() throws {
        try withFolder { folder in
            let socket = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
            defer { close(socket) }
            var address = sockaddr_un()
            address.sun_family = sa_family_t(AF_UNIX)
            withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: Array("\(folder)/sock".utf8)) }
            let isBound = withUnsafePointer(to: &address) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    bind(socket, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) == 0
                }
            }
            #expect(isBound && listen(socket, 4) == 0)
            let uri = "qemu:///system?socket=\(folder)/sock"
            let error = #expect(throws: MigrationError.self) {
                try LibvirtConnection(uri: uri, patience: .milliseconds(200))
            }
            #expect(error?.code == .unavailable && error?.message.contains("has not answered for") == true)
        }
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
        // What it would get only after its next start must not pass for done.
        var other = xml
        other.manifest.vm.memory.bytes = 4 << 30
        let refused = #expect(throws: MigrationError.self) { try deployment.define(other) }
        #expect(refused?.code == .failedPrecondition && refused?.hint?.contains("rollback") == true)
        #expect(try domain.xml().contains("<memory unit='KiB'>8388608</memory>"))
        // What is said of the migration changes nothing for the guest.
        other = xml
        other.manifest.capturedAt.seconds += 60
        _ = try deployment.define(other)

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

    /// What `flotilla gpu bind` refuses to take from the host is not chosen for a VM either.
    @Test func whatTheHostUsesIsNotChosen() throws {
        try withFolder { folder in
            func put(_ path: String, _ text: String) throws {
                try Files.createDirectories(Files.parent(of: "\(folder)/\(path)"))
                try Files.writeAtomically(Array("\(text)\n".utf8), to: "\(folder)/\(path)")
            }
            func link(_ path: String, _ target: String) throws {
                try Files.createDirectories(Files.parent(of: "\(folder)/\(path)"))
                try FileManager.default.createSymbolicLink(
                    atPath: "\(folder)/\(path)", withDestinationPath: target)
            }
            let mdev = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
            let expected: [(address: String, device: UInt32, code: UInt32, use: String)] = [
                ("0001:3b:00.0", 0x20b5, 0x0302, "process 4242 (Xorg)"),
                ("0001:3c:00.0", 0x2204, 0x0300, "the kernel's console on fb0"),
                ("0001:5e:00.0", 0xa80a, 0x0108, "a mounted file system on nvme0n1"),
                ("0001:5f:00.0", 0xa80b, 0x0108, "swap space on nvme1n1"),
                ("0001:60:00.0", 0xa80c, 0x0108, "domain rawdisk's disk on nvme2n1"),
                ("0001:86:00.0", 0x1572, 0x0200, "network interface eth7, which is up"),
                ("0001:af:00.0", 0x1eb8, 0x0302, "mediated device \(mdev)"),
                ("0001:b0:00.0", 0x2235, 0x0302, ""),
            ]
            let devices = "sys/bus/pci/devices"
            for (index, function) in expected.enumerated() {
                let path = "\(devices)/\(function.address)"
                try put("\(path)/vendor", "0x10de")
                try put("\(path)/device", "0x" + String(function.device, radix: 16))
                try put("\(path)/class", "0x" + String(function.code << 8, radix: 16))
                try Files.createDirectories("\(folder)/sys/kernel/iommu_groups/\(index)")
                try link("\(path)/iommu_group", "../../../../kernel/iommu_groups/\(index)")
            }
            for path in [
                "sys/class/iommu/dmar0", "sys/bus/pci/drivers/vfio-pci", "\(devices)/0001:3b:00.0/drm/card1",
                "\(devices)/0001:3c:00.0/graphics/fb0", "\(devices)/0001:af:00.0/\(mdev)",
            ] { try Files.createDirectories("\(folder)/\(path)") }
            try put("proc/4242/comm", "Xorg")
            try link("proc/4242/fd/5", "/dev/dri/card1")
            for (number, bus) in ["5e", "5f", "60"].enumerated() {
                let disk = "bus/pci/devices/0001:\(bus):00.0/nvme/nvme\(number)/nvme\(number)n1"
                try put("sys/\(disk)/dev", "259:\(number)")
                try link("sys/class/block/nvme\(number)n1", "../../\(disk)")
            }
            try put("proc/self/mountinfo", "30 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
            try put("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme1n1 partition 1024 0 -2")
            try put("\(devices)/0001:86:00.0/net/eth7/operstate", "up")
            try link("sys/class/net/eth7", "../../bus/pci/devices/0001:86:00.0/net/eth7")
            let type = "\(devices)/0001:af:00.0/mdev_supported_types/nvidia-222"
            try put("\(type)/name", "GRID T4-2Q")
            try put("\(type)/available_instances", "3")

            let connection = try LibvirtConnection(uri: "test:///default")
            let id = UUID().uuidString
            let deployment = Deployment(connection: connection, migrationID: id)
            let manifest = linuxVM(id) { $0.disks[0].target = .with { ($0.path, $0.format) = ("/dev/nvme2n1", "raw") } }
            _ = try deployment.define(
                DomainXML(manifest: manifest, options: mapped { $0.domainName = "rawdisk" }, host: host("test")))
            defer { try? deployment.undefine("rawdisk") }
            let profile = try hostProfile(
                name: "kvm1", connection: connection, pools: [],
                devices: DeviceHost(sysfs: Sysfs(root: "\(folder)/sys"), folder: "\(folder)/gpu"),
                proc: "\(folder)/proc")
            #expect(profile.pciFunctions.map(\.inUseBy) == expected.map { $0.use })
            // A GPU that holds a vGPU has room for others.
            #expect(profile.room(for: VgpuProfile("grid_t4-2q")) == 3)
            for function in expected {
                let device = AssignedDevice.with {
                    ($0.id, $0.classCode) = ("device0", function.code)
                    $0.passthrough.id = .with { ($0.vendor, $0.device) = (0x10de, function.device) }
                }
                let findings = preflight(
                    manifest: linuxVM { $0.gpus = [device] }, options: mapped { $0.gpu = .gpuRequire }, pool: "main",
                    host: profile
                ).filter { $0.subject == "device0" }
                #expect(findings.count == (function.use.isEmpty ? 0 : 1), "\(findings.map(\.message))")
                #expect(
                    findings.allSatisfy {
                        $0.severity == .blocked && $0.message.hasSuffix("in use by \(function.use)")
                    }, "\(findings.map(\.message))")
            }
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
            #expect(!tpmEmulatorInstalled(in: [folder]))
            try Files.writeAtomically([], to: "\(folder)/swtpm_setup")
            #expect(tpmEmulatorInstalled(in: [folder]))
        }
    }
}
