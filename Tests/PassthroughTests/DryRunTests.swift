import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// A dry run tells what the run then does, write by write, and touches nothing.
@Suite struct DryRunTests {
    /// Notes what goes to the kernel.
    final class Recorder: SysfsWriter {
        private let kernel: VgpuKernel
        private let writes = Mutex<[HostStep]>([])

        init(_ kernel: VgpuKernel) { self.kernel = kernel }

        func write(_ text: String, to attribute: String) throws {
            writes.withLock { $0.append(.write(SysfsWrite(attribute: attribute, text: text))) }
            try kernel.write(text, to: attribute)
        }

        /// Since it was last asked.
        func taken() -> [HostStep] {
            writes.withLock { writes in
                defer { writes = [] }
                return writes
            }
        }
    }

    struct Machine {
        let machine: VgpuMachine
        let recorder: Recorder
        let host: VgpuHost

        init() throws {
            machine = try VgpuMachine()
            recorder = Recorder(machine.kernel)
            host = VgpuHost(
                sysfs: machine.sysfs, kernel: recorder, tools: machine.tools, folder: "\(machine.folder.path)/state")
        }

        /// Every folder, link and file with its bytes.
        func snapshot() throws -> [Substring] {
            try Program.run(
                "/usr/bin/find",
                [machine.folder.path, "-printf", "%p %y %l %s\\n", "-type", "f", "-exec", "md5sum", "{}", ";"]
            ).output.split(separator: "\n").sorted()
        }

        /// The plan's writes and programs are those that `body` does, each in their order.
        func expect<Value>(
            _ plan: () throws -> VgpuHost.Plan, isDoneBy body: () throws -> Value,
            sourceLocation: SourceLocation = #_sourceLocation
        ) throws -> [HostStep] {
            let before = try snapshot()
            let plan = try plan()
            #expect(try snapshot() == before, sourceLocation: sourceLocation)
            #expect(recorder.taken().isEmpty, sourceLocation: sourceLocation)
            let calls = machine.calls.count
            _ = try body()
            let written = plan.steps.filter { if case .write = $0 { true } else { false } }
            let ran = plan.steps.compactMap { step -> String? in
                if case .run(let words) = step { words.joined(separator: " ") } else { nil }
            }
            #expect(recorder.taken() == written, sourceLocation: sourceLocation)
            #expect(Array(machine.calls.dropFirst(calls)) == ran, sourceLocation: sourceLocation)
            return plan.steps
        }
    }

    let web = GPUOwner(domain: "web", migration: "", fence: 0)

    @Test func vendorVgpus() throws {
        let rig = try Machine()
        try rig.machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        try rig.machine.program("nvidia-smi", "exit 0")
        let gpu = try pci("0000:3b:00.0")
        let profile = VgpuProfile("A40-2Q")
        // Nothing can be known of functions that are not there.
        let early = try rig.host.plan(create: profile, for: web, device: "gpu0", on: gpu)
        #expect(early.steps == [.run(["sriov-manage", "-e", "0000:3b:00.0"])] && early.notes.count == 1)
        #expect(failure { try rig.host.plan(create: profile, for: web, device: "gpu0") }?.code == .resourceExhausted)
        let mixed = try rig.expect {
            try rig.host.plan(mixSizes: true, on: gpu)
        } isDoneBy: {
            try rig.host.setMixedSizes(true, on: gpu)
        }
        #expect(mixed.count == 2 && rig.host.plan(enable: gpu).steps.isEmpty)

        func create() throws -> VgpuHost.Plan {
            try rig.host.plan(create: profile, for: web, device: "gpu0", parameters: ["enable_uvm=1"])
        }
        let made = try rig.expect(create) {
            try rig.host.create(profile, for: web, device: "gpu0", parameters: ["enable_uvm=1"])
        }
        #expect(made.count == 3 && made[0] == mixed[1])
        #expect(
            rig.host.text(of: made[1])
                == "would write 558 to \(rig.machine.sysfs.root)/bus/pci/devices/0000:3b:00.1/nvidia/current_vgpu_type")
        #expect(try create().steps.isEmpty)
        #expect(
            failure { try rig.host.plan(mixSizes: true, on: gpu) }?.message.contains("has vGPUs (on 0000:3b:00.1)")
                == true)

        // A reboot.
        try rig.machine.reboot("3b")
        let rebooted = try rig.host.restorePlan()
        #expect(rebooted.steps == early.steps + [mixed[1]])
        #expect(rebooted.notes == ["then NVIDIA A40-2Q on 0000:3b:00.1 for domain web"])
        try rig.host.enableVirtualFunctions(of: gpu)
        let restored = try rig.expect(rig.host.restorePlan) { try rig.host.restore() }
        #expect(restored == made)
        #expect(try rig.host.restorePlan().steps.isEmpty)

        let destroyed = try rig.expect {
            try rig.host.plan(destroy: rig.host.records())
        } isDoneBy: {
            try rig.host.destroy(of: web)
        }
        #expect(destroyed.count == 1)
    }

    @Test func mediatedDevices() throws {
        let rig = try Machine()
        try rig.machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2)])
        try rig.machine.program("mdevctl", "exit 0")
        let profile = VgpuProfile("grid_t4-4q")
        let made = try rig.expect {
            try rig.host.plan(create: profile, for: web, device: "gpu0")
        } isDoneBy: {
            try rig.host.create(profile, for: web, device: "gpu0")
        }
        let gone = try rig.expect {
            try rig.host.plan(destroy: rig.host.records())
        } isDoneBy: {
            try rig.host.destroy(of: web)
        }
        #expect(made.count == 2 && gone.count == 2)
        // Somebody has the whole card.
        let other = GPUOwner(domain: "render", migration: "m-2", fence: 1)
        try rig.machine.ledger.reserve([GPUResource(function: try pci("0000:af:00.0"))], for: other)
        let refused = failure { try rig.host.plan(create: profile, for: web, device: "gpu0") }
        #expect(refused?.message.contains("is reserved for domain render") == true, "\(refused?.message ?? "none")")
    }

    @Test func instances() throws {
        let rig = try Machine()
        try rig.machine.migGPU("3b")
        let plan = try rig.host.plan(create: VgpuProfile("A100-1-5C"), for: web, device: "gpu0")
        #expect(plan.steps == [.run(["nvidia-smi", "mig", "-i", "0000:3b:00.0", "-cgi", "19:6", "-C"])])
        #expect(plan.notes.first == "then a A100-1-5C on the first virtual function that offers it")
        let none = failure { try rig.host.plan(create: VgpuProfile("A100-5-10C"), for: web, device: "gpu0") }
        #expect(none?.message.contains("no GPU instance profile 5g.10gb") == true)
        #expect(rig.recorder.taken().isEmpty && !rig.machine.calls.contains { $0.contains(" -cgi ") })
        _ = try rig.host.create(VgpuProfile("A100-1-5C"), for: web, device: "gpu0")
        #expect(rig.machine.calls.contains("nvidia-smi mig -i 0000:3b:00.0 -cgi 19:6 -C"))
    }

    /// Of a device that is not NVIDIA's.
    @Test func virtualFunctions() throws {
        let rig = try Machine()
        let folder = "bus/pci/devices/0000:41:00.0"
        try rig.machine.put("\(folder)/vendor", "0x8086\n")
        try rig.machine.put("\(folder)/sriov_totalvfs", "4\n")
        let gpu = try pci("0000:41:00.0")
        let attribute = "\(rig.machine.sysfs.root)/\(folder)/sriov_numvfs"
        #expect(rig.host.plan(enable: gpu).steps.map(rig.host.text) == ["would write 4 to \(attribute)"])
        let tree = try DeviceTree(rig.machine.sysfs)
        #expect(try rig.host.plan(disable: gpu, in: tree).steps.isEmpty)
        try rig.machine.put("\(folder)/virtfn0/vendor", "0x8086\n")
        #expect(try rig.host.plan(disable: gpu, in: tree).steps.map(rig.host.text) == ["would write 0 to \(attribute)"])
    }

    @Test func driversThereAndBack() throws {
        let rig = try BindRig()
        let (gpu, nic) = (try pci("0000:01:00.0"), try pci("0000:06:00.0"))
        let kernel = FixtureKernel(rig.sysfs)
        let bind = try rig.binder(kernel).plan(bind: [gpu, nic], observe: rig.observe())
        #expect(kernel.log.isEmpty && rig.journal.isEmpty)
        _ = try rig.binder(kernel).bind([gpu, nic], observe: rig.observe())
        #expect(kernel.log == bind.writes.map(\.line))
        let release = try rig.binder(kernel).plan(release: [gpu, nic], observe: rig.observe())
        #expect(kernel.log.count == bind.writes.count && release.writes.count == 9)
        _ = try rig.binder(kernel).release([gpu, nic], observe: rig.observe())
        #expect(Array(kernel.log.dropFirst(bind.writes.count)) == release.writes.map(\.line))
        #expect(try rig.binder(kernel).plan(release: [gpu], observe: rig.observe()).writes.isEmpty)
    }

    @Test func reset() throws {
        let rig = try BindRig()
        let gpu = try pci("0000:01:00.0")
        try Files.writeAtomically([], to: rig.sysfs.path("bus/pci/devices/0000:01:00.0/reset"))
        let kernel = FixtureKernel(rig.sysfs)
        let host = DeviceHost(sysfs: rig.sysfs, kernel: kernel, folder: "\(rig.folder.path)/state")
        #expect(try host.plan(reset: [gpu], observe: rig.observe()).isEmpty)
        let owner = GPUOwner(domain: "web", migration: "m-1", fence: 1)
        try host.ledger.reserve([GPUResource(function: gpu, sysfs: rig.sysfs)], for: owner)
        try host.ledger.handOver(to: owner)
        try host.ledger.release(of: owner)
        let plan = try host.plan(reset: [gpu], observe: rig.observe())
        #expect(kernel.log.isEmpty && rig.journal.isEmpty)
        _ = try host.reset([gpu], observe: rig.observe())
        #expect(kernel.log == plan.map(\.line))
    }
}

extension SysfsWrite {
    /// As `FixtureKernel` notes it.
    fileprivate var line: String { "\(attribute) \(text.dropLast())" }
}
