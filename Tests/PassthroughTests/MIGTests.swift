import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Passthrough

/// MIG-backed vGPUs and the GPU instances they need, on stand-ins for A100 cards.
@Suite struct MIGTests {
    let web = GPUOwner(domain: "web", migration: "m-1", fence: 1)
    let render = GPUOwner(domain: "render", migration: "m-2", fence: 1)
    private let gpu = "0000:3b:00.0"

    private func card(_ instances: String = "", old: Bool = false) throws -> VgpuMachine {
        let machine = try VgpuMachine()
        try machine.migGPU("3b", old: old)
        if !instances.isEmpty { try machine.partition("3b", instances) }
        return machine
    }

    private func current(_ machine: VgpuMachine, _ record: VgpuRecord) -> String? {
        machine.sysfs.text("bus/pci/devices/\(record.function)/nvidia/current_vgpu_type")
    }

    /// The small one lies where it leaves the large ones possible.
    @Test func anInstanceComesAndGoesWithItsVgpu() throws {
        let machine = try card()
        let host = machine.host()
        let small = try host.create(VgpuProfile("grid_a100-1-5c"), for: web, device: "gpu0")
        #expect(current(machine, small) == "470" && machine.instances("3b") == ["1g.5gb:6"])
        let large = try host.create(VgpuProfile("A100-4-20C"), for: render, device: "gpu0")
        #expect(current(machine, large) == "475" && machine.instances("3b") == ["4g.20gb:0", "1g.5gb:6"])
        #expect(try host.create(VgpuProfile("A100-1-5C"), for: web, device: "gpu0") == small)
        try host.destroy(of: web)
        #expect(machine.instances("3b") == ["4g.20gb:0"] && current(machine, small) == "0")
        try host.destroy(of: render)
        #expect(try machine.instances("3b").isEmpty && host.migs.read().made.isEmpty && host.records().isEmpty)
    }

    /// Its nvidia-smi knows nothing of places: the driver chooses.
    @Test func anOldDriver() throws {
        let machine = try card(old: true)
        let host = machine.host()
        let small = try host.create(VgpuProfile("A100-1-5C"), for: web, device: "gpu0")
        #expect(current(machine, small) == "470" && machine.instances("3b") == ["1g.5gb:0"])
        let error = failure { try host.create(VgpuProfile("A100-4-20C"), for: render, device: "gpu0") }
        #expect(error?.code == .resourceExhausted && error?.message.contains("Insufficient Resources") == true)
        #expect(machine.instances("3b") == ["1g.5gb:0"])
        try host.destroy(of: web)
        #expect(machine.instances("3b").isEmpty)
    }

    @Test func othersInstancesAreUsedAndStay() throws {
        let machine = try card("9:4")
        let host = machine.host()
        _ = try host.create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        #expect(machine.instances("3b") == ["3g.20gb:4"])
        _ = try host.create(VgpuProfile("A100-3-20C"), for: render, device: "gpu0")
        #expect(machine.instances("3b") == ["3g.20gb:0", "3g.20gb:4"])
        try host.destroy(of: web)
        try host.destroy(of: render)
        #expect(machine.instances("3b") == ["3g.20gb:4"])
    }

    /// An instance that another vGPU got meanwhile goes with that one.
    @Test func anInstanceInUseIsInherited() throws {
        let machine = try card("9:4")
        let host = machine.host()
        _ = try host.create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        _ = try host.create(VgpuProfile("A100-3-20C"), for: render, device: "gpu0")
        try machine.write("0", to: "mig/\(gpu)/busy")
        try host.destroy(of: render)
        #expect(try host.records().map(\.owner) == [web] && host.migs.read().made.map(\.owner) == [web])
        try machine.write("", to: "mig/\(gpu)/busy")
        try host.destroy(of: web)
        #expect(machine.instances("3b") == ["3g.20gb:4"])
    }

    @Test func anInstanceThatCantGoKeepsTheRecord() throws {
        let machine = try card()
        let host = machine.host()
        _ = try host.create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        try machine.write("0 4", to: "mig/\(gpu)/busy")
        let error = failure { try host.destroy(of: web) }
        #expect(error?.message.contains("3g.20gb") == true && error?.hint != nil)
        #expect(try host.records().map(\.phase) == [.destroying])
        try machine.write("", to: "mig/\(gpu)/busy")
        try host.destroy(of: web)
        #expect(try machine.instances("3b").isEmpty && host.records().isEmpty)
    }

    /// The first has no room and the second no MIG mode; the third serves.
    @Test func anotherGPUOfTheHost() throws {
        let machine = try card("0:0")
        try machine.migGPU("4c", isOn: false)
        try machine.migGPU("5e")
        let made = try machine.host().create(VgpuProfile("A100-2-10C"), for: web, device: "gpu0")
        #expect(made.physical == "0000:5e:00.0" && machine.instances("3b") == ["7g.40gb:0"])
        #expect(!machine.calls.contains { $0.contains("0000:4c") })
        try machine.host().destroy(of: web)
        #expect(machine.instances("5e").isEmpty && machine.instances("3b") == ["7g.40gb:0"])
    }

    /// The GPU that is tried first takes an instance, but none of its functions becomes a vGPU.
    @Test func anotherGPUAfterOneThatFails() throws {
        let deaf = Set((1...7).map { "0000:3b:00.\($0)" } + ["0000:3b:01.0"])
        let machine = try VgpuMachine { VgpuKernel(sysfs: $0, deaf: deaf) }
        try machine.migGPU("3b")
        try machine.migGPU("5e")
        let made = try machine.host().create(VgpuProfile("A100-2-10C"), for: web, device: "gpu0")
        #expect(made.physical == "0000:5e:00.0" && machine.instances("3b").isEmpty)
    }

    @Test func noInstanceOnAGPUOfAnotherDomain() throws {
        let machine = try card()
        try machine.migGPU("5e")
        let others = try Set([#require(PciAddress(gpu))])
        let made = try machine.host().create(VgpuProfile("A100-2-10C"), for: web, device: "gpu0", besides: others)
        #expect(made.physical == "0000:5e:00.0" && machine.instances("3b").isEmpty)
    }

    @Test func noMIGModeSaysWhatToDo() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b", isOn: false)
        let error = failure { try machine.host().create(VgpuProfile("A100-2-10C"), for: web, device: "gpu0") }
        #expect(error?.code == .failedPrecondition && error?.message.contains("MIG mode") == true)
        #expect(error?.hint?.contains("flotilla gpu profiles --enable-mig \(gpu)") == true, "\(error?.hint ?? "")")
        #expect(error?.hint?.contains("nvidia-smi -i \(gpu) -mig 1") == true)
        #expect(!machine.calls.contains { $0.contains("-mig 1") }, "never without being asked")
    }

    /// One slice at 0 and one at 4: three slices must begin at one of these.
    @Test(arguments: [false, true]) func instancesInOtherPlaces(_ old: Bool) throws {
        let machine = try card()
        try machine.partition("3b", "19:0,19:4")
        if old { try machine.write("", to: "mig/old") }
        let made = try machine.host().create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        #expect(current(machine, made) == "474")
        let there = machine.instances("3b")
        #expect(there.count { $0.hasPrefix("1g.5gb") } == 2 && there.count { $0.hasPrefix("3g.20gb") } == 1, "\(there)")
        try machine.host().destroy(of: web)
        #expect(machine.instances("3b").count == 2 && machine.instances("3b").allSatisfy { $0.hasPrefix("1g.5gb") })
    }

    /// Nothing is touched that something uses, or that could not be made again as it was.
    @Test(arguments: ["apps", "divided", "vGPU", "full"]) func whatIsInUseIsNotMoved(_ why: String) throws {
        let machine = try card("19:0,19:4" + (why == "full" ? ",9:4" : ""))
        switch why {
        case "apps": try machine.write("4711\n", to: "mig/\(gpu)/apps")
        case "divided": try machine.write("", to: "mig/\(gpu)/divided")
        case "vGPU": _ = try machine.host().create(VgpuProfile("A100-1-5C"), for: render, device: "gpu0")
        default: break
        }
        let before = machine.instances("3b")
        let profile = VgpuProfile(why == "full" ? "A100-7-40C" : "A100-3-20C")
        let error = failure { try machine.host().create(profile, for: web, device: "gpu0") }
        #expect(error?.code == .resourceExhausted, "\(error?.message ?? "")")
        #expect(machine.instances("3b") == before && !machine.calls.contains { $0.contains("-dgi") })
        if why == "apps" { #expect(error?.message.contains("4711") == true, "\(error?.message ?? "")") }
    }

    /// The second one can't be destroyed: the first is made again where it was.
    @Test(arguments: [false, true]) func aRearrangementThatFailsGoesBack(_ old: Bool) throws {
        let machine = try card("19:0,19:4")
        if old { try machine.write("", to: "mig/old") }
        try machine.write("4", to: "mig/\(gpu)/busy")
        let error = failure { try machine.host().create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0") }
        #expect(error?.message.contains("In use by another client") == true, "\(error?.message ?? "")")
        #expect(machine.calls.contains { $0.contains("-dgi") })
        #expect(machine.instances("3b") == ["1g.5gb:0", "1g.5gb:4"])
        #expect(try machine.host().migs.read().change == nil)
    }

    @Test func aRebootTakesInstancesAndRestoreBringsThemBack() throws {
        let machine = try card()
        let names = ["A100-1-5C", "A100-2-10C", "A100-3-20C"]
        let made = try names.enumerated().map { index, name in
            try machine.host().create(
                VgpuProfile(name), for: GPUOwner(domain: "d\(index)", migration: "m-\(index)", fence: 1), device: "gpu0"
            )
        }
        let before = machine.instances("3b")
        try machine.rebootMIG("3b")
        #expect(machine.instances("3b").isEmpty)
        #expect(try machine.host(boot: "boot-2").restore().map(\.function) == made.map(\.function))
        #expect(machine.instances("3b") == before)
        for index in names.indices {
            try machine.host(boot: "boot-2").destroy(
                of: GPUOwner(domain: "d\(index)", migration: "m-\(index)", fence: 1))
        }
        #expect(machine.instances("3b").isEmpty)
        // After another one somebody else's may have the same number: what was made before is nobody's.
        _ = try machine.host(boot: "boot-2").create(VgpuProfile("A100-7-40C"), for: web, device: "gpu0")
        try machine.rebootMIG("3b")
        try machine.write("0", to: "mig/\(gpu)/count")
        try machine.partition("3b", "0:0")
        try machine.host(boot: "boot-3").destroy(of: web)
        #expect(machine.instances("3b") == ["7g.40gb:0"])
    }

    @Test func dryRunsSayTheCommands() throws {
        let machine = try card()
        let host = machine.host()
        let plan = try host.plan(create: VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        #expect(plan.steps == [.run(["nvidia-smi", "mig", "-i", gpu, "-cgi", "9:4", "-C"])])
        _ = try host.create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        #expect(machine.calls.contains("nvidia-smi mig -i \(gpu) -cgi 9:4 -C"))
        let gone = try host.plan(destroy: host.records())
        #expect(gone.steps.suffix(2).map(host.text).allSatisfy { $0.contains("mig -i \(gpu) -gi 1 -d") })
        try machine.migGPU("4c", isOn: false)
        let tree = try DeviceTree(machine.sysfs)
        let mode = try host.plan(mig: true, of: try pci("0000:4c:00.0"), in: tree)
        #expect(mode.steps == [.run(["nvidia-smi", "-i", "0000:4c:00.0", "-mig", "1"])])
    }

    @Test func theModeIsChangedWhenAskedAndFree() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b", isOn: false)
        let (host, address) = (machine.host(), try pci(gpu))
        func set(_ isOn: Bool) -> MigrationError? {
            failure { try host.setMIG(isOn, of: address, in: DeviceTree(machine.sysfs)) }
        }
        try machine.write("", to: "mig/\(gpu)/held")
        let pending = set(true)
        #expect(pending?.code == .internal)
        #expect(pending?.message.contains("still is not") == true && pending?.hint?.contains("--gpu-reset") == true)
        try Files.remove("\(machine.folder.path)/mig/\(gpu)/held")
        #expect(set(true) == nil && set(true) == nil)
        _ = try host.create(VgpuProfile("A100-3-20C"), for: web, device: "gpu0")
        let used = set(false)
        #expect(used?.message.contains("has a vGPU") == true && used?.message.contains("3g.20gb") == true)
        try host.destroy(of: web)
        #expect(set(false) == nil)
        #expect(failure { try host.setMIG(true, of: pci("0000:99:00.0"), in: DeviceTree(machine.sysfs)) } != nil)
    }

    /// None is changed where one would be refused.
    @Test func severalSettingsAreJudgedFirst() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b", isOn: false)
        let (host, address, unknown) = (machine.host(), try pci(gpu), try pci("0000:99:00.0"))
        let observe = { try DeviceTree(machine.sysfs) }
        let refused = failure { try host.set([(address, .mig(true)), (unknown, .mig(true))], observe: observe) }
        #expect(refused?.code == .failedPrecondition && !machine.calls.contains { $0.contains("-mig 1") })
        // What could not be known before says what was done.
        try machine.migGPU("4c", isOn: false)
        try machine.write("", to: "mig/0000:4c:00.0/held")
        let second = try pci("0000:4c:00.0")
        let failed = failure { try host.set([(address, .mig(true)), (second, .mig(true))], observe: observe) }
        #expect(failed?.code == .internal && failed?.message.contains("MIG mode on for \(gpu)") == true)
    }

    @Test func listsOfTheGuide() {
        let mig = Mig(
            profiles: """
                |   0  MIG 1g.5gb        19     7/7        4.75       No     14     0     0   |
                |                                                             1     0     0   |
                |   0  MIG 3g.20gb        9     1/2        19.62      No     42     2     0   |
                """,
            placements: """
                GPU  0 Profile ID 19 Placements: {0,1,2,3,4,5,6}:1
                GPU  0 Profile ID  9 Placements: {0,4}:4
                GPU  0 Profile ID  0 Placement : {0}:8
                """,
            instances: "|   0  MIG 3g.20gb       9        2          0:4     |")
        #expect(mig.profiles.map(\.starts) == [[0, 1, 2, 3, 4, 5, 6], [0, 4]] && mig.profiles.map(\.free) == [7, 1])
        #expect(mig.instances.map { [$0.name, $0.id, "\($0.start):\($0.size)"] } == [["3g.20gb", "2", "0:4"]])
        #expect(mig.start(for: "3g.20gb") == 4 && mig.start(for: "1g.5gb") == 6)
        #expect(mig.packing(of: ["1g.5gb", "3g.20gb", "3g.20gb"]) == nil)
        #expect(mig.packing(of: ["1g.5gb", "3g.20gb"])?.map(\.start) == [4, 0])
    }
}

/// Dies by SIGKILL before every command that changes a GPU's instances, and after the last; the next process puts things right.
@Suite(.serialized) struct MIGCrashTests {
    /// Adding needs one command; rearranging two for each of the two there are, and one.
    static let adding = ["gpu.mig-journaled", "gpu.mig-step", "gpu.mig-done"]
    static let rearranging = ["gpu.mig-journaled"] + (1...5).map { "gpu.mig-step:\($0)" } + ["gpu.mig-done"]

    private func machine() throws -> VgpuMachine {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        try machine.partition("3b", "19:0,19:4")
        return machine
    }

    private let before = ["1g.5gb:0", "1g.5gb:4"]

    private static func create(_ host: VgpuHost, _ profile: String, fence: UInt64 = 1) throws -> VgpuRecord {
        try host.create(
            VgpuProfile(profile), for: GPUOwner(domain: "web", migration: "m-1", fence: fence), device: "gpu0")
    }

    private func killed(_ machine: VgpuMachine, _ profile: String, at point: String) async throws {
        let root = machine.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [root = root as String, point = point as String, profile = profile as String] in
            setenv(Failpoint.environmentKey, point, 1)
            _ = try Self.create(VgpuMachine.host(root), profile)
        }
    }

    @Test(arguments: [("A100-2-10C", adding), ("A100-3-20C", rearranging)])
    func killedThenGoesOn(_ profile: String, _ points: [String]) async throws {
        for point in points {
            let machine = try machine()
            try await killed(machine, profile, at: point)
            let made = try Self.create(machine.host(), profile, fence: 2)
            #expect(
                made.phase == .present && machine.instances("3b").count == 3, "\(point): \(machine.instances("3b"))")
            try machine.host().destroy(of: GPUOwner(domain: "web", migration: "m-1", fence: 3))
            let there = machine.instances("3b")
            #expect(there.count == 2 && there.allSatisfy { $0.hasPrefix("1g.5gb") }, "\(point): \(there)")
            #expect(try machine.host().migs.read().made.isEmpty && machine.ledger.reservations().isEmpty)
        }
    }

    /// What a worker or `flotilla gpu restore` does at its start. Killed there too, at its own first commands.
    @Test(arguments: [("A100-2-10C", adding), ("A100-3-20C", rearranging)])
    func killedThenRecovered(_ profile: String, _ points: [String]) async throws {
        for point in points {
            for again in [nil, "gpu.mig-step:1", "gpu.mig-step:3"] {
                let machine = try machine()
                try await killed(machine, profile, at: point)
                if let again {
                    let root = machine.folder.path
                    // It may have less to do than that.
                    _ = await #expect(processExitsWith: .failure) {
                        [root = root as String, again = again as String] in
                        setenv(Failpoint.environmentKey, again, 1)
                        _ = try VgpuMachine.host(root).restore()
                        exit(1)
                    }
                }
                _ = try machine.host().restore()
                #expect(machine.instances("3b") == before, "\(point), then \(again ?? "-"): \(machine.instances("3b"))")
                #expect(try machine.host().migs.read().change == nil)
            }
        }
    }

    /// Made and written down, and its vGPU never was: it goes with its migration.
    @Test(arguments: [false, true]) func anInstanceWithoutItsVgpu(_ isReaped: Bool) async throws {
        let machine = try machine()
        try await killed(machine, "A100-2-10C", at: "gpu.vgpu-recorded")
        try Files.remove("\(machine.folder.path)/state/vgpus.json")
        #expect(machine.instances("3b").count == 3)
        let owner = GPUOwner(domain: "web", migration: "m-1", fence: 2)
        #expect(try machine.host().holds(owner))
        if isReaped {
            #expect(try machine.host().reap { _ in false }.destroyed.isEmpty && machine.instances("3b").count == 3)
            _ = try machine.host().reap { $0.isSame(as: owner) }
        } else {
            try machine.host().destroy(of: owner)
        }
        #expect(try machine.instances("3b") == before && !machine.host().holds(owner))
    }

    /// What to go back to on one GPU outlives what is to be made again on another.
    @Test func aChangeThatCanNotBePutBackIsKept() async throws {
        let machine = try machine()
        try machine.migGPU("5e")
        let render = GPUOwner(domain: "render", migration: "m-2", fence: 1)
        _ = try machine.host().create(
            VgpuProfile("A100-7-40C"), for: render, device: "gpu0", on: PciAddress("0000:5e:00.0"))
        try await killed(machine, "A100-3-20C", at: "gpu.mig-step:5")
        try machine.rebootMIG("5e")
        try machine.partition("3b", "9:0")
        try machine.write("0", to: "mig/0000:3b:00.0/busy")
        #expect(failure { try machine.host().restore() }?.message.contains("can't be put back") == true)
        #expect(try machine.host().migs.read().change?.before.count == 2 && machine.instances("5e").isEmpty)
        try machine.write("", to: "mig/0000:3b:00.0/busy")
        #expect(try machine.host().restore().map(\.physical) == ["0000:5e:00.0"])
        #expect(machine.instances("3b") == before && machine.instances("5e") == ["7g.40gb:0"])
    }

    @Test func aWorkersStartSaysWhatItPutBack() async throws {
        let machine = try machine()
        try await killed(machine, "A100-3-20C", at: "gpu.mig-step:5")
        #expect(machine.instances("3b").isEmpty)
        // Somebody was quicker, and uses it: all waits, but for what needs no instance.
        try machine.partition("3b", "9:0")
        try machine.write("0", to: "mig/0000:3b:00.0/busy")
        let blocked = failure { try Self.create(machine.host(), "A100-1-5C", fence: 2) }
        #expect(blocked?.message.contains("(1g.5gb at 0, 1g.5gb at 4)") == true, "\(blocked?.message ?? "")")
        #expect(blocked?.hint?.contains("mig.json") == true)
        let sliced = failure { try Self.create(machine.host(), "A100-40C", fence: 2) }
        #expect(sliced?.code == .resourceExhausted)
        try machine.write("", to: "mig/0000:3b:00.0/busy")
        let host = machine.host()
        #expect(try host.exclusively { try host.settleInstances() }?.contains("as they were") == true)
        #expect(machine.instances("3b") == before)
    }
}
