import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Passthrough

/// Several vGPUs on one GPU instance, on a stand-in for an RTX PRO 6000 Blackwell.
@Suite struct VgpuShareTests {
    private let gpu = "0000:3b:00.0"

    private func card(_ vgpus: String = blackwellVgpus, on machine: VgpuMachine? = nil) throws -> VgpuMachine {
        let machine = try machine ?? VgpuMachine()
        try machine.migGPU("3b", types: blackwellTypes, vgpus: vgpus)
        let link = machine.sysfs.path("bus/pci/devices/\(gpu)/driver")
        try #require(symlink("../../drivers/nvidia", link) == 0)
        try machine.put("bus/pci/devices/\(gpu)/class", "0x030200\n")
        return machine
    }

    private func profile(_ name: String) -> VgpuProfile { VgpuProfile("NVIDIA RTX Pro 6000 Blackwell \(name)") }

    private func owner(_ number: Int) -> GPUOwner {
        GPUOwner(domain: "d\(number)", migration: "m-\(number)", fence: 1)
    }

    @discardableResult
    private func create(_ machine: VgpuMachine, _ name: String, _ number: Int) throws -> VgpuRecord {
        try machine.host().create(profile(name), for: owner(number), device: "gpu0")
    }

    @Test func whatTheDriverTellsOfItsTypes() throws {
        let types = supportedVgpus(
            """
            GPU 00000000:3B:00.0
                vGPU Type ID                          : 0x5ee
                    Name                              : NVIDIA RTX Pro 6000 Blackwell DC-2B
                    Class                             : NVS
                    GPU Instance Profile ID           : N/A
                    Max Instances                     : 32
                    Max Instances Per VM              : 1
                    Max Instances Per GI              : N/A
                    FB Memory                         : 2048 MiB
            GPU 00000000:AF:00.0
                vGPU Type ID                          : 0x618
                    Name                              : NVIDIA RTX Pro 6000 Blackwell DC-1-12Q
                    GPU Instance Profile ID           : 47
                    Max Instances                     : 8
                    Max Instances Per VM              : 1
                    Max Instances Per GI              : 2
            """)
        #expect(try types.map(\.gpu) == [pci(gpu), pci("0000:af:00.0")] && types.map(\.id) == ["1518", "1560"])
        #expect(types.map(\.instance) == [nil, "47"] && types.map(\.mostPerInstance) == [0, 2])
        #expect(types.map(\.most) == [32, 8])
    }

    /// "-": an older driver, which tells only how many the whole GPU holds.
    @Test(arguments: [blackwellVgpus, blackwellVgpus.replacing(" 1\n", with: " -\n").replacing(" 2\n", with: " -\n")])
    func theInstanceGoesWithItsLastVgpu(_ vgpus: String) throws {
        let machine = try card(vgpus)
        #expect(try captured(machine).room(for: profile("DC-1-12Q")) == 8)
        #expect(try captured(machine).room(for: profile("DC-1-24Q")) == 4)
        #expect(try captured(machine).room(for: profile("DC-4-24Q")) == 4)
        for number in 1...3 { try create(machine, "DC-1-12Q", number) }
        #expect(machine.instances("3b").map { $0.prefix(11) } == ["1g.24gb+gfx", "1g.24gb+gfx"])
        #expect(try captured(machine).room(for: profile("DC-1-12Q")) == 5)
        let gone = try machine.host().plan(destroy: machine.host().records(ofDomain: "d1"))
        #expect(!gone.steps.map(machine.host().text).contains { $0.contains("-dgi") })
        try machine.host().destroy(of: owner(1))
        #expect(try machine.instances("3b").count == 2 && machine.host().records().count == 2)
        // Nobody knows on which of the two it was.
        try create(machine, "DC-1-12Q", 4)
        #expect(machine.instances("3b").count == 2)
        for number in [3, 2] {
            try machine.host().destroy(of: owner(number))
            #expect(machine.instances("3b").count == 2)
        }
        let last = try machine.host().plan(destroy: machine.host().records(ofDomain: "d4"))
        #expect(last.steps.map(machine.host().text).filter { $0.contains("-dgi") }.count == 2)
        try machine.host().destroy(of: owner(4))
        #expect(try machine.instances("3b").isEmpty && machine.host().migs.read().made.isEmpty)
        #expect(try machine.host().records().isEmpty && machine.ledger.reservations().isEmpty)
    }

    /// A driver that tells on which instance a vGPU is: one that no other is on goes at once.
    @Test func theInstanceIsKnown() throws {
        let machine = try card()
        let records = try (1...3).map { try create(machine, "DC-1-12Q", $0) }
        // The third had to be given one of its own.
        let ids = try [1, 3].map { number in
            try #require(machine.host().migs.read().made.first { $0.isFor(owner(number), "gpu0") }).instance.id
        }
        func tell(_ record: VgpuRecord, _ id: String) throws {
            try machine.put("bus/pci/devices/\(record.function)/nvidia/gpu_instance_id", "\(id)\n")
        }
        for (record, id) in zip(records, [ids[0], ids[0], ids[1]]) { try tell(record, id) }
        try machine.host().destroy(of: owner(1))
        #expect(machine.instances("3b").count == 2)
        let lone = try machine.host().plan(destroy: machine.host().records(ofDomain: "d3"))
        let told = lone.steps.map(machine.host().text)
        #expect(told.filter { $0.contains("-gi \(ids[1]) -dgi") }.count == 1, "\(told), \(ids)")
        // Of no instance that is there: nothing is known.
        try tell(records[1], "77")
        let unsure = try machine.host().plan(destroy: machine.host().records(ofDomain: "d3"))
        #expect(!unsure.steps.map(machine.host().text).contains { $0.contains("-dgi") })
        try tell(records[1], ids[0])
        try machine.host().destroy(of: owner(3))
        #expect(try machine.host().instances(of: pci(gpu)).all().map(\.id) == [ids[0]])
        try machine.host().destroy(of: owner(2))
        #expect(try machine.instances("3b").isEmpty && machine.host().migs.read().made.isEmpty)
    }

    /// What is said to fit is made, and what is not is refused.
    @Test(arguments: [
        ["DC-1-12Q", "DC-1-12Q", "DC-1-12Q", "DC-2-24Q", "DC-1-24Q", "DC-2-24Q", "DC-1-12Q", "DC-2-24Q"],
        ["DC-4-24Q", "DC-4-24Q", "DC-1-12Q", "DC-4-24Q", "DC-4-24Q", "DC-4-24Q"],
        ["DC-1-24Q", "DC-1-12Q", "DC-2-48Q", "DC-1-24Q", "DC-1-12Q", "DC-2-24Q"],
    ])
    func whatFitsIsMade(_ wanted: [String]) throws {
        let machine = try card()
        let devices = wanted.enumerated().map { GpuMappingTests.vgpu("gpu\($0)", "\(profile($1))") }
        let said = try matchDevices(devices, on: captured(machine)).entries.map(\.findings.isEmpty)
        let made = try wanted.enumerated().map { index, name in
            let alone = try captured(machine).room(for: profile(name)) > 0
            let passes = try checkDevices(
                [pci(gpu)], vgpu: "\(profile(name))", in: DeviceTree(machine.sysfs),
                migs: machine.host().migs(of: [pci(gpu)])
            ).contains { $0.requirement == "profile" && $0.verdict == .pass }
            let error = failure { try create(machine, name, index) }
            #expect(alone == (error == nil), "\(index) \(name): \(error?.message ?? "was made")")
            #expect(passes == (error == nil), "\(index) \(name): \(error?.message ?? "was made")")
            return error == nil
        }
        #expect(said == made && made.contains(true) && made.contains(false))
    }

    @Test func aRebootTakesThemAndRestoreBringsThemBack() throws {
        let machine = try card()
        let made = try (1...3).map { try create(machine, "DC-1-12Q", $0) }
        let before = machine.instances("3b")
        try machine.host().destroy(of: owner(1))
        try machine.rebootMIG("3b")
        let host = machine.host(boot: "boot-2")
        #expect(try host.restorePlan().steps.map(host.text).filter { $0.contains("-cgi") }.count == 1)
        #expect(try host.restore().map(\.function) == made.dropFirst().map(\.function))
        #expect(machine.instances("3b").count == 1 && before.count == 2)
        try host.destroy(of: owner(3))
        #expect(machine.instances("3b").count == 1)
        try host.destroy(of: owner(2))
        #expect(try machine.instances("3b").isEmpty && host.migs.read().made.isEmpty)
    }

    /// The dry run names the places where they were, each once.
    @Test func whereRestoreMakesThem() throws {
        let machine = try card()
        for number in 1...4 { try create(machine, "DC-1-24Q", number) }
        try machine.host().destroy(of: owner(2))
        let places = machine.instances("3b").map { "47:\($0.suffix(1))" }
        try machine.rebootMIG("3b")
        let host = machine.host(boot: "boot-2")
        let steps = try host.restorePlan().steps.map(host.text).filter { $0.contains("-cgi") }
        let planned = steps.compactMap { step in places.first { step.contains("-cgi \($0) ") } }
        #expect(steps.count == 3 && planned.sorted() == places.sorted(), "\(steps)")
        try host.restore()
        #expect(machine.instances("3b").map { "47:\($0.suffix(1))" } == places)
    }

    /// Somebody else's vGPU may be on ours.
    @Test func othersKeepTheInstance() throws {
        let machine = try card()
        try create(machine, "DC-1-12Q", 1)
        try machine.kernel.write("1560", to: "bus/pci/devices/0000:3b:00.7/nvidia/current_vgpu_type")
        try machine.host().destroy(of: owner(1))
        #expect(try machine.instances("3b").count == 1 && machine.host().migs.read().made.isEmpty)
        #expect(try machine.host().records().isEmpty && machine.ledger.reservations().isEmpty)
    }

    /// The driver tells nothing: by the name where it says enough.
    @Test func withoutTheDriversWord() throws {
        var mig = Mig.with { mig in
            mig.enabled = true
            mig.profiles = ["1g.24gb", "1g.24gb+gfx", "4g.96gb+gfx"].map { name in
                .with { ($0.name, $0.free, $0.total) = (name, 4, 4) }
            }
        }
        #expect(mig.home(of: profile("DC-1-24Q"))?.name == "1g.24gb+gfx" && mig.home(of: profile("DC-1-12Q")) == nil)
        #expect(missingHome(of: profile("DC-1-12Q"), mig, gpu).remedy.contains("-i \(gpu) -cgi ID -C"))
        mig.profiles[1].vgpus = [profile("DC-1-12Q").key: 2]
        #expect(mig.home(of: profile("DC-1-24Q")) == nil)
        #expect(missingHome(of: profile("DC-1-24Q"), mig, gpu).remedy.contains("DC-1-12Q"))
        let machine = try card("")
        let error = failure { try create(machine, "DC-4-24Q", 1) }
        #expect(error?.message.contains("does not tell") == true && error?.hint?.contains("-cgi ID -C") == true)
        let check = try checkDevices(
            [pci(gpu)], vgpu: "A100-4-10C", in: DeviceTree(machine.sysfs), migs: machine.host().migs(of: [pci(gpu)]))
        let missing = check.first { $0.requirement == "profile" && $0.verdict == .fail }
        #expect(missing?.found.contains("does not tell") == true && missing?.remedy?.contains("-cgi ID -C") == true)
    }

    /// One finding and one way out.
    @Test func aFunctionThatADomainHasWithoutAVgpu() throws {
        let machine = try card()
        try machine.partition("3b", "47:0")
        let part = try pci("0000:3b:00.1")
        let link = machine.sysfs.path("bus/pci/devices/\(part)/driver")
        try #require(symlink("../../drivers/nvidia", link) == 0)
        try machine.put("bus/pci/devices/\(part)/class", "0x030200\n")
        var around = Surroundings()
        around.domains = [
            GPULedger.Domain(
                name: "web", migration: "", resources: [GPUResource(function: part, sysfs: machine.sysfs)])
        ]
        func failures() throws -> [Requirement] {
            try checkDevices(
                [part], vgpu: "\(profile("DC-1-12Q"))", in: DeviceTree(machine.sysfs, around: around),
                migs: machine.host().migs(of: [pci(gpu)])
            ).filter { $0.verdict == .fail && $0.subject != "host" }
        }
        #expect(try failures().map(\.requirement) == ["free"])
        #expect(try failures().first?.remedy?.contains("destroy") == false)
        try machine.kernel.write("1560", to: "bus/pci/devices/\(part)/nvidia/current_vgpu_type")
        #expect(try failures().contains { $0.remedy?.hasPrefix("destroy that vGPU") == true })
    }
}
