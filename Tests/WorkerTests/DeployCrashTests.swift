import Deploy
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

@testable import Worker

/// Dies by SIGKILL at every point of a deploy and of an undeploy that changes the host; the next process puts it right.
/// What a real libvirtd knows outlives the process that told it.
@Suite(.serialized, PrivateLibvirt(), .timeLimit(.minutes(5))) struct DeployCrashTests {
    static let deploying = [
        "deploy.permitted", "gpu.vgpu-recorded", "gpu.vgpu-created", "gpu.vgpu-kept", "deploy.claimed",
        "deploy.defined",
    ]
    static let removing = ["undeploy.undefined", "gpu.vgpu-destroyed", "gpu.vgpu-forgotten"]

    private func rig() throws -> DeployRig {
        let rig = try DeployRig(uri: PrivateLibvirt.uri)
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        return rig
    }

    private static func handler(_ root: String, _ uri: String) -> DeployHandler {
        let sysfs = Sysfs(root: "\(root)/sys")
        let devices = DeviceHost(
            sysfs: sysfs, kernel: VgpuKernel(sysfs: sysfs), tools: VgpuTools(folders: ["\(root)/bin"]),
            folder: "\(root)/state")
        return DeployHandler(
            configuration: DeployRig.configuration(root, uri, devices), permit: { _, _ in }, mayAct: { _ in true },
            announce: {})
    }

    /// What a worker does at its start.
    private func recover(_ rig: DeployRig, underWay: Set<String>) throws -> [Finding] {
        let owners = try LibvirtConnection(uri: rig.uri).deviceOwners(sysfs: rig.machine.sysfs)
        return try rig.machine.devices.recover(libvirt: rig.uri, domains: owners, underWay: underWay)
    }

    private func killed(_ rig: DeployRig, at point: String, undeploying: Bool = false) async throws {
        let (root, uri) = (rig.root, rig.uri)
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [root = root as String, uri = uri as String, point = point as String, undeploying = undeploying as Bool] in
            setenv(Failpoint.environmentKey, point, 1)
            let handler = Self.handler(root, uri)
            if undeploying {
                try await handler.takeBack("crash", fence: 2)
            } else {
                try await handler.run(DeployRig.request(root, "crash", [a100, t4Profile]))
            }
        }
    }

    private var room: String { "bus/pci/devices/0000:5e:00.0/mdev_supported_types/nvidia-222/available_instances" }

    private func expectDeployed(_ rig: DeployRig) throws {
        let record = try #require(try rig.machine.host().records().first)
        let uuid = try #require(record.uuid)
        #expect(try rig.machine.host().records().count == 1 && record.phase == .present)
        #expect(rig.machine.sysfs.list("bus/mdev/devices") == [uuid] && rig.machine.sysfs.number(room) == 3)
        #expect(try rig.entries == ["mdev:\(uuid) crash reserved", "pci:0000:3b:00.0 crash reserved"])
        let xml = try #require(try rig.domain("crash")).xml()
        #expect(xml.contains(uuid) && xml.contains("bus='0x3b'"))
    }

    private func expectNothing(_ rig: DeployRig, dirty: Bool) throws {
        #expect(try rig.domain("crash") == nil)
        #expect(try rig.entries == (dirty ? ["pci:0000:3b:00.0 crash dirty"] : []))
        #expect(try rig.machine.host().records().isEmpty)
        #expect(rig.machine.sysfs.list("bus/mdev/devices").isEmpty && rig.machine.sysfs.number(room) == 4)
    }

    @Test(arguments: deploying) func killedWhileDeployingThenGoesOn(_ point: String) async throws {
        let rig = try rig()
        try await killed(rig, at: point)
        let before = try rig.entries
        // The worker's next process has the task in its journal: what was taken for it stays.
        #expect(try recover(rig, underWay: ["m-crash"]).isEmpty)
        #expect(try rig.entries == before)
        try await Self.handler(rig.root, rig.uri).run(
            DeployRig.request(rig.root, "crash", [a100, t4Profile]), fence: 2)
        try expectDeployed(rig)
        try await Self.handler(rig.root, rig.uri).takeBack("crash", fence: 3)
        try expectNothing(rig, dirty: true)
    }

    /// Nobody goes on: another process finds what is left. A domain that was defined is somebody's, and keeps what it has.
    @Test(arguments: deploying) func killedWhileDeployingForGood(_ point: String) async throws {
        let rig = try rig()
        try await killed(rig, at: point)
        _ = try recover(rig, underWay: [])
        guard point == "deploy.defined" else { return try expectNothing(rig, dirty: false) }
        try expectDeployed(rig)
        try await Self.handler(rig.root, rig.uri).takeBack("crash", fence: 2)
        try expectNothing(rig, dirty: true)
    }

    /// Cancelled before another attempt was made: the coordinator asks for an undeploy, under a larger fence.
    @Test(arguments: deploying) func killedWhileDeployingThenTakenBack(_ point: String) async throws {
        let rig = try rig()
        try await killed(rig, at: point)
        #expect(try recover(rig, underWay: ["m-crash"]).isEmpty)
        try await Self.handler(rig.root, rig.uri).takeBack("crash", fence: 2)
        try expectNothing(rig, dirty: point == "deploy.defined")
    }

    @Test(arguments: removing) func killedWhileUndeploying(_ point: String) async throws {
        let rig = try rig()
        try await Self.handler(rig.root, rig.uri).run(DeployRig.request(rig.root, "crash", [a100, t4Profile]))
        try expectDeployed(rig)
        try await killed(rig, at: point, undeploying: true)
        try await Self.handler(rig.root, rig.uri).takeBack("crash", fence: 3)
        try expectNothing(rig, dirty: true)
    }

    @Test(arguments: removing) func killedWhileUndeployingForGood(_ point: String) async throws {
        let rig = try rig()
        try await Self.handler(rig.root, rig.uri).run(DeployRig.request(rig.root, "crash", [a100, t4Profile]))
        try await killed(rig, at: point, undeploying: true)
        _ = try recover(rig, underWay: [])
        try expectNothing(rig, dirty: true)
    }

    /// The made devices are none that QEMU could open.
    @Test func failureToStartGivesEverythingBack() async throws {
        let rig = try rig()
        let request = try rig.request("crash", [a100, t4Profile]) { $0.options.start = true }
        let outcome = await failure { try await rig.handler().run(request) }
        #expect(outcome?.message.contains("start domain crash") == true, "\(outcome.map { "\($0)" } ?? "")")
        #expect(outcome?.message.contains("was undefined again") == true)
        try expectNothing(rig, dirty: false)
    }

    /// A process that lives, and has taken a device for a domain that it is about to define, keeps it.
    @Test func whatALivingProcessTookStays() async throws {
        let rig = try rig()
        let (root, uri) = (rig.root, rig.uri)
        async let other = #expect(processExitsWith: .exitCode(0)) {
            [root = root as String, uri = uri as String] in
            let sysfs = Sysfs(root: "\(root)/sys")
            let ledger = GPULedger(folder: "\(root)/state")
            let address = try #require(PciAddress("0000:3b:00.0"))
            try ledger.reserve(
                [GPUResource(function: address, sysfs: sysfs)],
                for: GPUOwner(domain: "other", migration: "m-other", fence: 1, libvirt: uri))
            while !Files.exists("\(root)/go") { usleep(2000) }
            exit(0)
        }
        while try rig.entries.isEmpty { try await Task.sleep(for: .milliseconds(2)) }
        #expect(try recover(rig, underWay: []).isEmpty)
        #expect(try rig.entries == ["pci:0000:3b:00.0 other reserved"])
        try Files.writeAtomically([], to: "\(root)/go")
        _ = await other
        #expect(try recover(rig, underWay: []).map(\.message).contains { $0.contains("given back") })
        #expect(try rig.entries.isEmpty)
    }

    /// A vGPU made by hand, for a domain that somebody will define, is nobody's leftover.
    @Test func whatWasMadeByHandStays() throws {
        let rig = try rig()
        let owner = GPUOwner(domain: "later", migration: "", fence: 0)
        let made = try rig.machine.host().create(VgpuProfile("T4-2Q"), for: owner, device: "gpu0")
        #expect(try recover(rig, underWay: []).isEmpty)
        #expect(try rig.machine.host().records() == [made] && rig.entries.count == 1)
    }
}
