import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

@testable import Worker

/// What a deploy takes of the host's devices, and what is left of that when it does not come to its end.
@Suite(.timeLimit(.minutes(1))) struct DeployTests {
    @Test func theDomainHasWhatTheLedgerSays() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        let result = try await rig.handler().run(rig.request("takes", [a100, t4Profile]))
        #expect(result.devices == ["0000:3b:00.0"] && result.vgpus.map(\.function) == ["0000:5e:00.0"])
        let uuid = try #require(result.vgpus.first?.uuid)
        #expect(try rig.entries == ["mdev:\(uuid) takes reserved", "pci:0000:3b:00.0 takes reserved"])
        let xml = try #require(try rig.domain("takes")).xml()
        #expect(xml.contains("uuid='\(uuid)'") && xml.contains("bus='0x3b'"))
        // Again, by the next attempt: the same.
        let again = try await rig.handler().run(rig.request("takes", [a100, t4Profile]), fence: 2)
        #expect(again.devices == result.devices && again.vgpus == result.vgpus)

        let second = await failure { try await rig.handler().run(rig.request("second", [a100])) }
        #expect(second?.message.contains("in use by domain takes") == true, "\(second.map { "\($0)" } ?? "")")
        #expect(try rig.domain("second") == nil)

        // Without its vGPU the domain keeps only the rest.
        _ = try await rig.handler().run(rig.request("takes", [a100]), fence: 3)
        #expect(try rig.entries == ["pci:0000:3b:00.0 takes reserved"])
        #expect(try rig.machine.host().records().isEmpty)
    }

    /// A GPU in MIG mode without an instance: it is cut for the deploy, and put together after.
    @Test func aMIGBackedVgpuGetsItsInstance() async throws {
        let rig = try DeployRig()
        try rig.machine.migGPU("3b")
        try rig.gpu("3b", device: "0x20f1")
        try rig.machine.partition("3b", "9:4")
        let small = AssignedDevice.with {
            ($0.id, $0.classCode) = ("gpu0", 0x0302)
            $0.vgpu.profile = "grid_a100-2-10c"
        }
        let result = try await rig.handler().run(rig.request("mig", [small]))
        let function = try #require(result.vgpus.first?.function)
        #expect(rig.machine.instances("3b").count == 2 && rig.machine.instances("3b").contains("3g.20gb:4"))
        #expect(try rig.entries == ["pci:\(function) mig reserved"])
        // No third one of two slices, and the worker says so before anything is made.
        let large = AssignedDevice.with {
            ($0.id, $0.classCode) = ("gpu0", 0x0302)
            $0.vgpu.profile = "grid_a100-4-20c"
        }
        let full = await failure { try await rig.handler().run(rig.request("full", [large])) }
        #expect(
            full?.code == .failedPrecondition && full?.message.contains("is cut into") == true, "\(full?.message ?? "")"
        )
        try await rig.handler().takeBack("mig")
        #expect(rig.machine.instances("3b") == ["3g.20gb:4"])
        #expect(try rig.machine.host().records().isEmpty && rig.entries.isEmpty)

        // One that may not go on leaves no instance.
        let refused = await failure {
            try await rig.handler { throw MigrationError(.cancelled, "no permit") }.run(rig.request("mig", [small]))
        }
        #expect(refused != nil && rig.machine.instances("3b") == ["3g.20gb:4"])
    }

    /// Both have chosen before either takes: the ledger decides, and the loser hears who has it.
    @Test func oneOfTwoDeploysGetsTheGPU() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        let outcomes = try await race(rig, ["race-a", "race-b"])
        let (winners, losers) = (outcomes.filter { $0.value == nil }.keys, outcomes.compactMapValues(\.self))
        let (winner, lost) = (try #require(winners.first), try #require(losers.first))
        #expect(winners.count == 1 && losers.count == 1)
        #expect(lost.value.message.contains("in use by domain \(winner)"), "\(lost.value)")
        #expect(try rig.entries == ["pci:0000:3b:00.0 \(winner) reserved"])
        #expect(try rig.domain(winner) != nil && rig.domain(lost.key) == nil)
    }

    /// With a second GPU the slower one takes that.
    @Test func twoDeploysGetTwoGPUs() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e")
        let outcomes = try await race(rig, ["both-a", "both-b"])
        #expect(outcomes.allSatisfy { $0.value == nil }, "\(outcomes)")
        #expect(try Set(rig.machine.ledger.reservations().map(\.owner.domain)) == ["both-a", "both-b"])
    }

    private func race(_ rig: DeployRig, _ names: [String]) async throws -> [String: MigrationError?] {
        let ready = Meeting(of: names.count)
        return try await withThrowingTaskGroup(of: (String, MigrationError?).self) { group in
            for name in names {
                group.addTask {
                    (
                        name,
                        await failure { try await rig.handler { await ready.come() }.run(rig.request(name, [a100])) }
                    )
                }
            }
            return try await group.reduce(into: [:]) { $0.updateValue($1.1, forKey: $1.0) }
        }
    }

    /// What libvirt refuses keeps nothing.
    @Test func failureToDefineGivesEverythingBack() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        let uuid = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
        _ = try await rig.handler().run(
            rig.request("has-uuid", []) { ($0.manifest.vm.biosUuid, $0.options.keepUuid) = (uuid, true) })
        let clash = await failure {
            try await rig.handler().run(
                rig.request("wants-uuid", [a100, t4Profile]) {
                    ($0.manifest.vm.biosUuid, $0.options.keepUuid) = (uuid, true)
                })
        }
        #expect(clash?.code == .alreadyExists, "\(clash.map { "\($0)" } ?? "")")
        #expect(try rig.entries.isEmpty && rig.machine.host().records().isEmpty)
        #expect(rig.machine.sysfs.list("bus/mdev/devices").isEmpty)
    }

    /// Its guest had the GPU; then libvirt refuses what shall take its domain's place. Or somebody undefined that.
    @Test(arguments: [true, false]) func aUsedGPUIsNotForgotten(_ isDefined: Bool) async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        let name = "used-\(isDefined)"
        _ = try await rig.handler().run(rig.request(name, [a100]) { $0.options.start = true })
        let domain = try #require(try rig.domain(name))
        try domain.destroy()
        if !isDefined { try domain.undefine() }
        let request = try rig.request(name, [a100]) {
            ($0.manifest.vm.biosUuid, $0.options.keepUuid) = ("4dea22b3-1d52-d8f3-2516-782e98ab3fa1", true)
            // More than libvirt can count.
            $0.manifest.vm.memory.bytes = 1 << 63
        }
        let refused = await failure { try await rig.handler().run(request, fence: 2) }
        let message = refused?.message ?? ""
        #expect(message.contains("define domain \(name): libvirt: "), "\(message)")
        // What was there is there again.
        #expect(try rig.domain(name)?.uuid() == (isDefined ? domain.uuid() : nil))
        #expect(try rig.entries == ["pci:0000:3b:00.0 \(name) \(isDefined ? "reserved" : "dirty")"])
    }

    /// A domain names a GPU that the ledger knows nothing of, and whose driver still makes vGPUs.
    @Test func noVgpuOnAGPUOfAnotherDomain() async throws {
        let rig = try DeployRig()
        for bus in ["3b", "5e"] { try rig.gpu(bus, mdev: true) }
        #expect(try await rig.handler().run(rig.request("whole", [a100])).devices == ["0000:3b:00.0"])
        let gpu = GPUResource(function: try #require(PciAddress("0000:3b:00.0")))
        try rig.machine.ledger.forget([gpu], of: GPUOwner(domain: "whole", migration: "m-whole", fence: 1))
        let result = try await rig.handler().run(rig.request("part", [t4Profile]))
        #expect(result.vgpus.map(\.function) == ["0000:5e:00.0"])
        for name in ["whole", "part"] { try await rig.handler().takeBack(name) }
    }

    /// No room for the vGPU: the GPU that was reserved before it is free again.
    @Test func allOrNothing() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        let full = "bus/pci/devices/0000:5e:00.0/mdev_supported_types/nvidia-222/available_instances"
        let outcome = await failure {
            let handler = rig.handler { try rig.machine.put(full, "0\n") }
            return try await handler.run(rig.request("nothing", [a100, t4Profile]))
        }
        #expect(outcome?.message.contains("T4-2Q") == true, "\(outcome.map { "\($0)" } ?? "")")
        #expect(try rig.entries.isEmpty && rig.domain("nothing") == nil)
    }

    /// Two A100 of a board whose NVSwitch is in their IOMMU group: the switch serves others too, so none of them goes.
    @Test(arguments: ["nvidia", "vfio-pci"]) func twoGPUsWithASwitchInTheirGroup(_ driver: String) async throws {
        let rig = try DeployRig()
        for bus in ["3b", "3c", "3d"] { try rig.gpu(bus, group: 5) }
        try rig.machine.function("0000:3d:00.0", ["device": "0x1af1\n", "class": "0x068000\n"])
        try rig.bind("0000:3d:00.0", driver)
        var second = a100
        second.id = "gpu1"
        let request = try rig.request("nvlink-\(driver)", [a100, second])
        let outcome = await failure { try await rig.handler().run(request) }
        guard driver == "nvidia" else {
            // One that was taken from the host, by someone's consent, is in the way of nothing.
            #expect(outcome == nil, "\(outcome.map { "\($0)" } ?? "")")
            return
        }
        #expect(outcome?.code == .failedPrecondition)
        let message = outcome?.message ?? ""
        #expect(message.contains("shares IOMMU group 5 with "), "\(message)")
        #expect(message.contains("0000:3d:00.0 (10de:1af1, nvidia)"), "\(message)")
        #expect(try rig.entries.isEmpty && rig.domain("nvlink-nvidia") == nil)
    }

    @Test func failedVerificationIsTakenBack() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        let request = try rig.request("unproven", [a100]) {
            $0.options.start = true
            $0.options.verification = .with { ($0.console, $0.timeoutSeconds) = ("never", 1) }
        }
        let outcome = await failure { try await rig.handler().run(request) }
        #expect(outcome?.code == .deadlineExceeded)
        #expect(outcome?.message.hasSuffix("domain unproven was undefined again, its disks stay") == true)
        #expect(try rig.domain("unproven") == nil)
        // A guest had it.
        #expect(try rig.entries == ["pci:0000:3b:00.0 unproven dirty"])
        #expect(Files.exists("\(rig.root)/pool/unproven.raw"))
        // Its own dirt is in nobody's way but others'.
        let other = await failure { try await rig.handler().run(rig.request("other", [a100])) }
        #expect(other?.message.contains("what domain unproven (migration m-unproven) left in it") == true)
        try await rig.handler().run(rig.request("unproven", [a100]), fence: 2)
        #expect(try rig.entries == ["pci:0000:3b:00.0 unproven reserved"])
    }

    /// Somebody may work with it, whatever the coordinator was told of the host's domains.
    @Test func whatWasDoneBeforeStaysWhenItFails() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        var request = try rig.request("used", [a100]) {
            $0.options.start = true
            $0.options.verification = .with { ($0.console, $0.timeoutSeconds) = ("login:", 1) }
        }
        let console = "\(rig.root)/worker/console/\(request.manifest.migrationID).log"
        try Files.createDirectories(Files.parent(of: console))
        try Files.writeAtomically(Array("login: ".utf8), to: console)
        try await rig.handler().run(request)
        // Rotated since.
        try Files.writeAtomically([], to: console)
        request.doneBefore = true
        let outcome = await failure { try await rig.handler().run(request, fence: 2) }
        #expect(outcome?.message.hasSuffix("domain used was there before and stays") == true)
        #expect(try rig.domain("used")?.state().isRunning == true)
        #expect(try rig.entries == ["pci:0000:3b:00.0 used reserved"])
        try rig.domain("used")?.destroy()
    }

    /// Cancelled while it waits for its proof: by somebody it is taken back; because the process ends, or the task is
    /// another's, it stays.
    @Test(arguments: [true, false]) func cancelledWhileVerifying(_ isOurs: Bool) async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        let name = "cancelled-\(isOurs)"
        let request = try rig.request(name, [a100]) {
            $0.options.start = true
            $0.options.verification = .with { ($0.console, $0.timeoutSeconds) = ("never", 300) }
        }
        let deploy = Task { await failure { try await rig.handler(mayAct: isOurs).run(request) } }
        while try rig.domain(name)?.state() != .running { try await Task.sleep(for: .milliseconds(5)) }
        deploy.cancel()
        #expect(await deploy.value?.code == .cancelled)
        #expect(try (rig.domain(name) == nil) == isOurs)
        #expect(try rig.entries == ["pci:0000:3b:00.0 \(name) \(isOurs ? "dirty" : "reserved")"])
    }

    @Test func undeploy() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        try await rig.handler().run(rig.request("gone", [a100, t4Profile]) { $0.options.start = true }, fence: 3)
        // Of a deploy that is over.
        #expect(await failure { try await rig.handler().takeBack("gone", fence: 2) }?.code == .aborted)
        #expect(try rig.domain("gone")?.state() == .running)
        let result = try await rig.handler().takeBack("gone", fence: 4, force: false)
        #expect(result.devices == ["0000:3b:00.0"])
        #expect(result.findings.first?.remedy.contains("gpu reset 0000:3b:00.0") == true)
        #expect(try rig.domain("gone") == nil && rig.machine.host().records().isEmpty)
        #expect(try rig.entries == ["pci:0000:3b:00.0 gone dirty"])
        #expect(Files.exists("\(rig.root)/pool/gone.raw"))
        // Again: nothing left to do, nothing said.
        #expect(try await rig.handler().takeBack("gone", fence: 5).devices.isEmpty)
        // A deploy from before comes too late.
        let late = await failure { try await rig.handler().run(rig.request("gone", [a100]), fence: 3) }
        #expect(late?.code == .aborted && late?.message.contains("stale") == true)

        // Somebody else's domain is not touched.
        try await rig.handler().run(rig.request("mine", []))
        let call = failure {
            try removeDeployment(
                of: GPUOwner(domain: "mine", migration: "m-other", fence: 1), rig.configuration(), stop: StopFlag(),
                force: true)
        }
        #expect(call?.code == .alreadyExists)
        #expect(try rig.domain("mine") != nil)
    }
}

/// Holds its visitors until all are there.
private actor Meeting {
    private var left: Int
    private var waiting: [CheckedContinuation<Void, Never>] = []

    init(of count: Int) { left = count }

    func come() async {
        left -= 1
        guard left > 0 else {
            for visitor in waiting { visitor.resume() }
            waiting = []
            return
        }
        await withCheckedContinuation { waiting.append($0) }
    }
}
