import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// Two libvirts of one host share its ledger; each knows only its own domains.
@Suite struct RecoveryTests {
    static let system = "qemu:///system"
    static let other = "test:///default"
    let machine: VgpuMachine
    let gpu: GPUResource

    init() throws {
        machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2)])
        try machine.function("0000:3b:00.0")
        gpu = GPUResource(function: try pci("0000:3b:00.0"))
    }

    private var host: DeviceHost {
        DeviceHost(
            sysfs: machine.sysfs, kernel: machine.kernel, tools: machine.tools, folder: "\(machine.folder.path)/state")
    }

    /// A vGPU and a GPU of migration m-1, which a domain had.
    private func take(_ libvirt: String?) throws -> VgpuRecord {
        let owner = GPUOwner(domain: "web", migration: "m-1", fence: 1, libvirt: libvirt)
        try machine.ledger.reserve([gpu], for: owner)
        let made = try machine.host().create(VgpuProfile("T4-4Q"), for: owner, device: "gpu0")
        try machine.ledger.handOver(to: owner)
        return made
    }

    private func recover(_ libvirt: String, _ domains: [GPULedger.Domain] = []) throws -> [Finding] {
        try host.recover(libvirt: libvirt, domains: domains, underWay: [])
    }

    private func expectAllThere(_ libvirt: String?) throws {
        let records = try machine.host().records()
        #expect(records.map(\.owner.libvirt) == [libvirt] && records.map(\.phase) == [.present])
        #expect(machine.sysfs.list("bus/mdev/devices") == records.compactMap(\.uuid))
        let entries = try machine.ledger.reservations()
        #expect(entries.count == 2 && entries.allSatisfy { $0.state == .reserved && $0.owner.libvirt == libvirt })
    }

    /// Its domain has lost the mark of its migration: it is that domain's all the same.
    @Test(arguments: ["", "m-other"]) func whatADomainNamesStays(_ migration: String) throws {
        let made = try take(Self.system)
        let uuid = try #require(made.uuid)
        let vgpu = GPUResource(mdev: uuid, partOf: [try pci("0000:af:00.0")])
        let domain = GPULedger.Domain(name: "web", migration: migration, resources: [vgpu])
        _ = try recover(Self.system, [domain])
        #expect(machine.sysfs.list("bus/mdev/devices") == [uuid])
        #expect(try machine.host().records().map(\.phase) == [.present])
    }

    @Test func anotherLibvirtsAreLeftAlone() throws {
        _ = try take(Self.system)
        #expect(try recover(Self.other).isEmpty)
        try expectAllThere(Self.system)
        // Its own one knows that the domain is gone.
        #expect(try recover(Self.system).count == 2)
        #expect(try machine.host().records().isEmpty && machine.sysfs.list("bus/mdev/devices").isEmpty)
        #expect(try machine.ledger.reservations().map(\.state) == [.dirty])
    }

    /// As earlier versions wrote them: nobody knows whose they are, until the libvirt with the domain comes.
    @Test func recordsWithoutALibvirt() throws {
        let made = try take(nil)
        let text = String(
            decoding: try Files.read("\(machine.folder.path)/state/ledger.json")
                + Files.read("\(machine.folder.path)/state/vgpus.json"), as: UTF8.self)
        #expect(!text.contains("libvirt"))
        for uri in [Self.other, Self.system] {
            let findings = try recover(uri)
            #expect(findings.map(\.severity) == [.warning, .warning])
            #expect(findings.allSatisfy { $0.message.contains("left alone") && $0.remedy.contains("--rollback") })
            try expectAllThere(nil)
        }
        let domain = GPULedger.Domain(
            name: "web", migration: "m-1",
            resources: [gpu, GPUResource(mdev: try #require(made.uuid), partOf: [try pci("0000:af:00.0")])])
        #expect(try recover(Self.system, [domain]).isEmpty)
        try expectAllThere(Self.system)
        #expect(try recover(Self.other).isEmpty)
        try expectAllThere(Self.system)
        #expect(try recover(Self.system).count == 2)
        #expect(try machine.host().records().isEmpty)
    }

    /// What earlier versions wrote is its migration's to take back.
    @Test func recordsWithoutALibvirtAreTakenBack() throws {
        _ = try take(nil)
        let owner = GPUOwner(domain: "web", migration: "m-1", fence: 2, libvirt: Self.system)
        #expect(try host.giveBack(of: owner) == [try pci("0000:3b:00.0")])
        #expect(try machine.host().records().isEmpty && machine.sysfs.list("bus/mdev/devices").isEmpty)
    }

    /// Both may name one GPU while they are off; the one that was first keeps it.
    @Test func domainsOfTwoLibvirtsWithOneGPU() throws {
        let (first, second) = (
            GPULedger.Domain(name: "web", migration: "", resources: [gpu]),
            GPULedger.Domain(name: "web", migration: "m-2", resources: [gpu])
        )
        _ = try recover(Self.system, [first])
        let findings = try recover(Self.other, [second])
        #expect(findings.map(\.severity) == [.warning])
        #expect(
            findings.first?.message.contains("\(Self.other) has 0000:3b:00.0, which domain web of \(Self.system)")
                == true)
        #expect(try machine.ledger.reservations().map(\.owner.libvirt) == [Self.system])
        // The same migration by another name of its server.
        _ = try recover(Self.system)
        try machine.ledger.forget([gpu], of: GPUOwner(domain: "web", migration: "", fence: 0))
        _ = try recover(Self.system, [second])
        #expect(try recover("qemu+unix:///system", [second]).isEmpty)
        #expect(try machine.ledger.reservations().map(\.owner.libvirt) == ["qemu+unix:///system"])
    }

    /// One that a guest has open can't go; after a reboot it has to be made again all the same.
    @Test func oneThatCanNotBeDestroyedIsStillWanted() throws {
        let made = try take(Self.system)
        // Nothing behind the tree takes the write.
        let busy = VgpuHost(sysfs: machine.sysfs, tools: machine.tools, folder: "\(machine.folder.path)/state")
        #expect(failure { try busy.destroy(of: made.owner) } != nil)
        try expectAllThere(Self.system)
        // Whoever finds it without its domain says so, and what to do.
        let blind = DeviceHost(sysfs: machine.sysfs, tools: machine.tools, folder: "\(machine.folder.path)/state")
        let said = try blind.recover(libvirt: Self.system, domains: [], underWay: []).filter { $0.severity == .warning }
        #expect(said.count == 1 && said.first?.subject == made.function, "\(said)")
        #expect(said.first?.message.contains("domain web (migration m-1), which is not there, and can't be") == true)
        #expect(said.first?.remedy.hasSuffix("the worker tries again when it is started") == true)
        #expect(try machine.host().records() == [made])
    }
}
