import Glibc
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// What a vGPU needs beyond its being there: parameters and mdevctl's bookkeeping, over crashes and reboots.
@Suite(.serialized) struct VgpuCrashTests {
    static let web = GPUOwner(domain: "web", migration: "m-1", fence: 1)
    static let making = [
        "gpu.vgpu-recorded", "gpu.vgpu-created", "gpu.vgpu-tuned", "gpu.vgpu-kept",
    ]
    private static let parameters = ["enable_uvm=1"]
    private let types = "bus/pci/devices/0000:af:00.0/mdev_supported_types/nvidia-222"

    private func mdevMachine() throws -> VgpuMachine {
        let machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2)])
        try machine.mdevctl()
        return machine
    }

    private static func create(_ host: VgpuHost, _ profile: String, fence: UInt64 = 1) throws -> VgpuRecord {
        try host.create(
            VgpuProfile(profile), for: GPUOwner(domain: "web", migration: "m-1", fence: fence), device: "gpu0",
            parameters: parameters)
    }

    private func killed(_ machine: VgpuMachine, creating profile: String, at point: String) async throws {
        let root = machine.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [root = root as String, point = point as String, profile = profile as String] in
            setenv(Failpoint.environmentKey, point, 1)
            _ = try Self.create(VgpuMachine.host(root), profile)
        }
    }

    private func expectWhole(_ machine: VgpuMachine, _ made: VgpuRecord) throws {
        let uuid = try #require(made.uuid)
        #expect(made.phase == .present && made.isInMdevctl)
        #expect(machine.sysfs.list("bus/mdev/devices") == [uuid] && machine.keptByMdevctl == [uuid])
        #expect(machine.sysfs.text("bus/mdev/devices/\(uuid)/nvidia/vgpu_params") == "enable_uvm=1")
        #expect(try machine.host().records() == [made])
    }

    private func expectNothing(_ machine: VgpuMachine) throws {
        #expect(machine.sysfs.list("bus/mdev/devices").isEmpty && machine.keptByMdevctl.isEmpty)
        #expect(try machine.host().records().isEmpty && machine.ledger.reservations().isEmpty)
        #expect(machine.sysfs.number("\(types)/available_instances") == 2)
    }

    @Test(arguments: making) func killedWhileMakingAMediatedDevice(_ point: String) async throws {
        let machine = try mdevMachine()
        try await killed(machine, creating: "T4-4Q", at: point)
        try expectWhole(machine, try Self.create(machine.host(), "T4-4Q", fence: 2))
        try machine.host().destroy(of: GPUOwner(domain: "web", migration: "m-1", fence: 3))
        try expectNothing(machine)
    }

    @Test(arguments: making) func killedWhileMakingThenTakenBack(_ point: String) async throws {
        let machine = try mdevMachine()
        try await killed(machine, creating: "T4-4Q", at: point)
        try machine.host().destroy(of: GPUOwner(domain: "web", migration: "m-1", fence: 2))
        try expectNothing(machine)
    }

    @Test(arguments: making) func killedWhileMakingOnTheVendorsPath(_ point: String) async throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        try machine.host().enableVirtualFunctions(of: pci("0000:3b:00.0"))
        try await killed(machine, creating: "A40-2Q", at: point)
        let made = try Self.create(machine.host(), "A40-2Q", fence: 2)
        #expect(made.phase == .present)
        #expect(machine.sysfs.text("bus/pci/devices/\(made.function)/nvidia/vgpu_params") == "enable_uvm=1")
    }

    @Test(arguments: ["gpu.vgpu-destroyed", "gpu.vgpu-forgotten"]) func killedWhileDestroying(
        _ point: String
    ) async throws {
        let machine = try mdevMachine()
        _ = try Self.create(machine.host(), "T4-4Q")
        let root = machine.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) { [root = root as String, point = point as String] in
            setenv(Failpoint.environmentKey, point, 1)
            try VgpuMachine.host(root).destroy(of: Self.web)
        }
        try machine.host().destroy(of: Self.web)
        try expectNothing(machine)
    }

    /// One that mdevctl would make again at boot is not gone.
    @Test func whatMdevctlKeepsIsNotForgotten() throws {
        let machine = try mdevMachine()
        let made = try Self.create(machine.host(), "T4-4Q")
        try machine.put("../locked", "")
        let refused = failure { try machine.host().destroy(of: Self.web) }
        #expect(refused?.message.contains("Read-only file system") == true, "\(refused?.message ?? "")")
        #expect(try machine.host().records().map(\.phase) == [.destroying])
        #expect(try machine.ledger.reservations().count == 1 && machine.keptByMdevctl == [made.uuid])
        try Files.remove("\(machine.folder.path)/locked")
        try machine.host().destroy(of: Self.web)
        try expectNothing(machine)
    }

    /// After a reboot mdevctl makes the device, without its parameters.
    @Test func whatMdevctlMakesAgainGetsItsParameters() throws {
        let machine = try mdevMachine()
        let made = try Self.create(machine.host(), "T4-4Q")
        let parameters = "bus/mdev/devices/\(try #require(made.uuid))/nvidia/vgpu_params"
        try machine.put(parameters, "")
        #expect(try machine.host(boot: "boot-2").restorePlan().steps.count == 1)
        #expect(try machine.host(boot: "boot-2").restore().map(\.uuid) == [made.uuid])
        #expect(machine.sysfs.text(parameters) == "enable_uvm=1")
        #expect(try machine.host(boot: "boot-2").restorePlan().steps.isEmpty)
        // Once in a boot: the driver refuses it while a VM runs.
        try machine.put(parameters, "")
        #expect(try machine.host(boot: "boot-2").restore().isEmpty)
        #expect(try Self.create(machine.host(boot: "boot-2"), "T4-4Q").phase == .present)
        #expect(machine.sysfs.text(parameters) == "")
        _ = try Self.create(machine.host(boot: "boot-3"), "T4-4Q")
        #expect(machine.sysfs.text(parameters) == "enable_uvm=1")
    }

    /// udev has mdevctl make the device as soon as its function is there, that is while it is being restored: there is no
    /// room for it then, and it needs none.
    @Test func whatMdevctlMakesMeanwhileIsNotMissing() throws {
        let machine = try VgpuMachine()
        try machine.function("0000:3b:00.0", ["sriov_totalvfs": "1\n"])
        try machine.mdevctl()
        try machine.program(
            "sriov-manage",
            """
            v=$S/bus/pci/devices/0000:3b:00.1; t=$v/mdev_supported_types/nvidia-558; mkdir -p $t; : > $t/create
            echo 0x10de > $v/vendor; ln -s ../0000:3b:00.0 $v/physfn
            ln -s ../0000:3b:00.1 $S/bus/pci/devices/0000:3b:00.0/virtfn0
            echo 'NVIDIA A40-48Q' > $t/name; echo 1 > $t/available_instances
            for uuid in $(ls $D/mdevctl.d 2>/dev/null); do
              mkdir -p $v/$uuid $S/bus/mdev/devices/$uuid/nvidia; : > $S/bus/mdev/devices/$uuid/nvidia/vgpu_params
              echo 0 > $t/available_instances
            done
            """)
        try machine.host().enableVirtualFunctions(of: pci("0000:3b:00.0"))
        let made = try Self.create(machine.host(), "A40-48Q")
        let uuid = try #require(made.uuid)
        try machine.reboot("3b")
        try Files.remove(machine.sysfs.path("bus/mdev/devices/\(uuid)"))
        #expect(try machine.host(boot: "boot-2").restore().map(\.uuid) == [uuid])
        #expect(machine.sysfs.text("bus/mdev/devices/\(uuid)/nvidia/vgpu_params") == "enable_uvm=1")
    }

    @Test func otherParametersMakeAnotherVgpu() throws {
        let machine = try mdevMachine()
        let made = try Self.create(machine.host(), "T4-4Q")
        let plain = try machine.host().create(VgpuProfile("T4-4Q"), for: Self.web, device: "gpu0")
        #expect(plain.uuid == made.uuid && plain.parameters.isEmpty)
        #expect(machine.sysfs.text("bus/mdev/devices/\(plain.uuid ?? "")/nvidia/vgpu_params") == "")
    }

    // MARK: - Mixed sizes

    private func mixedMachine() throws -> VgpuMachine {
        let machine = try VgpuMachine { VgpuKernel(sysfs: $0, capacity: 3) }
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558", "NVIDIA A40-4Q 559"])
        try machine.program("nvidia-smi", "[ $5 = 1 ] && : > $S/mixed || rm $S/mixed")
        try machine.host().setMixedSizes(true, on: pci("0000:3b:00.0"))
        return machine
    }

    private let mixing = "nvidia-smi vgpu -i 0000:3b:00.0 -shm 1"

    @Test func mixedSizesComeBackAfterAReboot() throws {
        let machine = try mixedMachine()
        let gpu = try pci("0000:3b:00.0")
        #expect(machine.calls == ["sriov-manage -e 0000:3b:00.0", mixing])
        let small = try machine.host().create(VgpuProfile("A40-2Q"), for: Self.web, device: "gpu0")
        let large = try machine.host().create(VgpuProfile("A40-4Q"), for: Self.web, device: "gpu1")
        #expect(failure { try machine.host().setMixedSizes(true, on: gpu) }?.message.contains(small.function) == true)
        try machine.reboot("3b")
        let calls = machine.calls.count
        #expect(try machine.host(boot: "boot-2").restore().map(\.function) == [small.function, large.function])
        // After the functions are there, once, before the first type.
        #expect(machine.calls.dropFirst(calls) == ["sriov-manage -e 0000:3b:00.0", mixing])
        #expect(machine.sysfs.text("bus/pci/devices/\(large.function)/nvidia/current_vgpu_type") == "559")

        // Also for those that are made first after a reboot.
        try machine.host().destroy(of: Self.web)
        try machine.reboot("3b")
        _ = try machine.host().create(VgpuProfile("A40-2Q"), for: Self.web, device: "gpu0", on: gpu)
        _ = try machine.host().create(VgpuProfile("A40-4Q"), for: Self.web, device: "gpu1", on: gpu)
        try machine.host().destroy(of: Self.web)

        try machine.host().setMixedSizes(false, on: gpu)
        #expect(machine.calls.last == "nvidia-smi vgpu -i 0000:3b:00.0 -shm 0")
        _ = try machine.host().create(VgpuProfile("A40-2Q"), for: Self.web, device: "gpu0")
        let refused = failure { try machine.host().create(VgpuProfile("A40-4Q"), for: Self.web, device: "gpu1") }
        #expect(refused?.code == .resourceExhausted)
    }

    @Test func aGPUThatCanNotMixSizesIsAsBefore() throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        try machine.program("nvidia-smi", "echo 'Not Supported'; exit 3")
        let refused = failure { try machine.host().setMixedSizes(true, on: pci("0000:3b:00.0")) }
        #expect(refused?.message.contains("Not Supported") == true)
        // Else this would fail too.
        _ = try machine.host().create(VgpuProfile("A40-2Q"), for: Self.web, device: "gpu0")
    }

    /// mdevctl would make the first one before the sizes may be mixed.
    @Test func mdevctlKeepsNoneOfMixedSizes() throws {
        let machine = try mdevMachine()
        try machine.program("nvidia-smi", "exit 0")
        try machine.host().setMixedSizes(true, on: pci("0000:af:00.0"))
        #expect(try !Self.create(machine.host(), "T4-4Q").isInMdevctl && machine.keptByMdevctl.isEmpty)
    }
}
