import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

@Suite struct DeviceHostTests {
    let owner = GPUOwner(domain: "web", migration: "m-1", fence: 1)

    /// Given back to its driver with a VM's leftovers in it: taken from there, reset, and back where it was.
    @Test func resetOfADirtyGPUOnItsDriver() throws {
        let rig = try BindRig()
        let (gpu, before) = (try pci("0000:01:00.0"), drivers(rig.sysfs))
        // A recorded tree holds what can be read; this can only be written.
        try Files.writeAtomically([], to: rig.sysfs.path("bus/pci/devices/0000:01:00.0/reset"))
        let kernel = FixtureKernel(rig.sysfs)
        let host = DeviceHost(sysfs: rig.sysfs, kernel: kernel, folder: "\(rig.folder.path)/state")
        #expect(try host.reset([gpu], observe: rig.observe()).isEmpty && kernel.log.isEmpty)
        let resource = GPUResource(function: gpu, sysfs: rig.sysfs)
        try host.ledger.reserve([resource], for: owner)
        try host.ledger.handOver(to: owner)
        #expect(try host.ledger.release(of: owner) == [resource])
        let other = GPUOwner(domain: "render", migration: "m-2", fence: 1)
        let refused = failure { try host.ledger.reserve([resource], for: other) }
        #expect(refused?.hint?.contains("flotilla gpu reset 0000:01:00.0") == true)

        #expect(try host.reset([gpu], observe: rig.observe()) == [gpu])
        let resetting = try #require(kernel.log.firstIndex(of: "bus/pci/devices/0000:01:00.0/reset 1"))
        let probe = try #require(kernel.log.firstIndex(of: "bus/pci/drivers_probe 0000:01:00.0"))
        #expect(probe < resetting && kernel.log.count > resetting + 1)
        #expect(drivers(rig.sysfs) == before && !rig.journal.contains("0000:01"))
        try host.ledger.reserve([resource], for: other)
    }

    /// What comes before a release (a reset) sees every function still bound, and nothing of one that is refused.
    @Test func beforeARelease() throws {
        let rig = try BindRig()
        let (gpu, binder) = (try pci("0000:01:00.0"), rig.binder(FixtureKernel(rig.sysfs)))
        _ = try binder.bind([gpu], observe: rig.observe())
        var seen: [String] = []
        func release(_ around: Surroundings = Surroundings()) throws {
            _ = try binder.release(
                [gpu], before: { seen += $0.map { "\($0) \(rig.driver($0))" } }, observe: rig.observe(around))
        }
        var held = Surroundings()
        held.domains = [GPULedger.Domain(name: "web", migration: "", resources: [GPUResource(function: gpu)])]
        #expect(failure { try release(held) }?.code == .failedPrecondition && seen.isEmpty)
        try release()
        #expect(seen == ["0000:01:00.0 vfio-pci", "0000:01:00.1 vfio-pci"])
    }

    /// None is touched where one can't be reset.
    @Test func resetIsJudgedBeforeTheFirst() throws {
        let rig = try BindRig()
        let addresses = [try pci("0000:01:00.0"), try pci("0000:06:00.0")]
        try Files.writeAtomically([], to: rig.sysfs.path("bus/pci/devices/0000:01:00.0/reset"))
        let kernel = FixtureKernel(rig.sysfs)
        let host = DeviceHost(sysfs: rig.sysfs, kernel: kernel, folder: "\(rig.folder.path)/state")
        try host.ledger.reserve(addresses.map { GPUResource(function: $0, sysfs: rig.sysfs) }, for: owner)
        try host.ledger.handOver(to: owner)
        try host.ledger.release(of: owner)
        let refused = failure { try host.reset(addresses, observe: rig.observe()) }
        #expect(refused?.code == .failedPrecondition && refused?.message.contains("reset 0000:06:00.0") == true)
        #expect(try kernel.log.isEmpty && host.ledger.reservations().count == 2)
    }

    /// Bound to vfio-pci at boot, with or without its audio, while another device's release is unfinished: only what
    /// the reset took goes back.
    @Test(arguments: [["0000:01:00.0", "0000:01:00.1"], ["0000:01:00.0"]])
    func resetOfAGPUThatWasBoundAtBoot(_ bound: [String]) throws {
        let rig = try BindRig()
        let gpu = try pci("0000:01:00.0")
        try Files.writeAtomically([], to: rig.sysfs.path("bus/pci/devices/0000:01:00.0/reset"))
        let kernel = FixtureKernel(rig.sysfs, failing: Set([3 * bound.count + 4]))
        for address in bound {
            try kernel.write("vfio-pci\n", to: "bus/pci/devices/\(address)/driver_override")
            try kernel.write("\(address)\n", to: "bus/pci/devices/\(address)/driver/unbind")
            try kernel.write("\(address)\n", to: "bus/pci/drivers_probe")
        }
        let state = "\(rig.folder.path)/state"
        let binder = Binder(sysfs: rig.sysfs, kernel: kernel, folder: state)
        let before = drivers(rig.sysfs)
        _ = try binder.bind([pci("0000:06:00.0")], observe: rig.observe())
        #expect(failure { try binder.release([pci("0000:06:00.0")], observe: rig.observe()) } != nil)

        let host = DeviceHost(sysfs: rig.sysfs, kernel: kernel, folder: state)
        try host.ledger.reserve([GPUResource(function: gpu, sysfs: rig.sysfs)], for: owner)
        try host.ledger.handOver(to: owner)
        try host.ledger.release(of: owner)
        #expect(try host.reset([gpu], observe: rig.observe()) == [gpu])
        #expect(drivers(rig.sysfs) == before)
        #expect(bound.allSatisfy { rig.driver($0) == "vfio-pci" } && rig.driver("0000:06:00.0") != "vfio-pci")
    }

    /// What no domain had is free again as it was.
    @Test func onlyWhatADomainHadIsDirty() throws {
        let folder = try TemporaryFolder()
        let ledger = GPULedger(folder: folder.path, boot: "b")
        let (a, b) = (GPUResource(function: try pci("0000:3b:00.0")), GPUResource(function: try pci("0000:5e:00.0")))
        try ledger.reserve([a], for: owner)
        try ledger.handOver(to: owner)
        try ledger.reserve([a, b], for: owner)
        #expect(try ledger.release(of: owner) == [a])
        #expect(try ledger.reservations().map(\.resource) == [a])
    }

    /// The kernel's console is on one framebuffer of two: the other card is free.
    @Test func onlyTheFramebufferWithConsolesIsInUse() throws {
        let tree = try MadeTree()
        for (bus, number) in [("01", 0), ("02", 1)] {
            try tree.device("0000:\(bus):00.0", 0x10de, 0x2204, class: 0x0300, driver: "nouveau", group: number + 1)
            _ = try tree.folder.sub("bus/pci/devices/0000:\(bus):00.0/graphics/fb\(number)")
        }
        _ = try tree.folder.sub("class/vtconsole/vtcon1")
        for (name, text) in [("name", "(M) frame buffer device\n"), ("bind", "1\n")] {
            try Files.writeAtomically(Array(text.utf8), to: tree.sysfs.path("class/vtconsole/vtcon1/\(name)"))
        }
        func users(_ consoles: Set<Int>?) throws -> [[String]] {
            var around = Surroundings()
            around.consoleFramebuffers = consoles
            return try DeviceTree(tree.sysfs, around: around).functions.map { $0.uses.map(\.by) }
        }
        #expect(try users([0]) == [["the kernel's console on fb0"], []])
        #expect(try users([1]) == [[], ["the kernel's console on fb1"]])
        // Nobody says: either may have it.
        #expect(try users(nil).allSatisfy { $0.count == 1 })
        #expect(try users([]).allSatisfy(\.isEmpty))
    }

    /// What the ledger has is not chosen, except for whom it has it.
    @Test func reservedAndDirtyDevicesAreNotMatched() throws {
        let (web, dirty) = (
            "domain web (migration m-1)", "what domain old (migration m-0) left in it (not reset since)"
        )
        var host = gpuHost()
        let folder = try TemporaryFolder()
        let ledger = GPULedger(folder: folder.path, boot: "b")
        let old = GPUOwner(domain: "old", migration: "m-0", fence: 1)
        try ledger.reserve([GPUResource(function: pci("0000:3b:00.0"))], for: owner)
        try ledger.reserve([GPUResource(function: pci("0000:5e:00.0"))], for: old)
        try ledger.handOver(to: old)
        try ledger.release(of: old)
        // It was cut into virtual functions since, which makes it no cleaner.
        host.pciFunctions[2].inUseBy = "its 16 virtual functions"
        markReserved(&host.pciFunctions, try ledger.reservations())
        let a100 = [passthrough("gpu0", 0x10de, 0x20f1)]
        let refused = matchDevices(a100, on: host, migration: "m-2").findings.map(\.message).joined(separator: "\n")
        #expect(refused.contains("in use by \(web)") && refused.contains("in use by \(dirty)"), "\(refused)")
        #expect(matchDevices(a100, on: host, migration: "m-1").devices.map { $0.map(\.address) } == [["0000:3b:00.0"]])
        #expect(matchDevices(a100, on: host, migration: "m-0").devices.map { $0.map(\.address) } == [["0000:5e:00.0"]])
    }

    /// Two A100 serve two VMs, whatever each of three could have alone.
    @Test func devicesAreTakenVMAfterVM() throws {
        var host = gpuHost()
        func vm(_ name: String, _ devices: [AssignedDevice]) -> Manifest {
            .with {
                ($0.vm.name, $0.migrationID, $0.gpus) = (name, "m-\(name)", devices)
            }
        }
        let options = DeployOptions.with { $0.gpu = .gpuRequire }
        let a100 = [passthrough("gpu0", 0x10de, 0x20f1)]
        let taken = ["a", "b", "c"].map { host.take(vm($0, a100), options) }
        #expect(taken == [true, true, false])
        let why = matchDevices(a100, on: host, migration: "m-c").findings.map(\.message).joined()
        #expect(why.contains("in use by VM a, which goes first") && why.contains("in use by VM b"), "\(why)")

        host = gpuHost {
            $0.pciFunctions.append(
                function("0000:c1:00.0", 0x10de, 0x1eb8, group: 70) {
                    $0.vgpuTypes = [.with { ($0.id, $0.name, $0.available) = ("nvidia-222", "GRID T4-2Q", 2) }]
                })
        }
        let t4 = AssignedDevice.with { ($0.id, $0.vgpu.profile) = ("gpu0", "grid_t4-2q") }
        let made = ["a", "b", "c"].map { host.take(vm($0, [t4]), options) }
        #expect(made == [true, true, false])
        // A GPU with vGPUs of others on it does not go as a whole.
        let whole = host.take(vm("d", [passthrough("gpu0", 0x10de, 0x1eb8)]), options)
        #expect(!whole)
    }

    /// On a host of 64 GPUs, all but the kernel's own part of moving one.
    @Test func bindAndReleaseTakeLittle() throws {
        let tree = try MadeTree()
        for index in 0..<64 {
            let bus = padded(index + 1, 2)
            try tree.device("0000:\(bus):00.0", 0x10de, 0x20b5, class: 0x0302, driver: "nvidia", group: index)
            try tree.device("0000:\(bus):00.1", 0x10de, 0x1aef, class: 0x0403, driver: "snd_hda_intel", group: index)
        }
        for driver in ["nvidia", "snd_hda_intel"] { _ = try tree.folder.sub("bus/pci/drivers/\(driver)") }
        for address in tree.sysfs.list("bus/pci/devices") {
            let path = tree.sysfs.path("bus/pci/devices/\(address)/driver_override")
            try Files.writeAtomically(Array("(null)\n".utf8), to: path)
        }
        let kernel = FixtureKernel(tree.sysfs)
        let state = try TemporaryFolder()
        let binder = Binder(sysfs: tree.sysfs, kernel: kernel, folder: state.path, boot: "b", loadDriver: {})
        let (gpu, observe) = (try pci("0000:20:00.0"), { try DeviceTree(tree.sysfs) })
        var times: [String: [Duration]] = [:]
        for _ in 0..<5 {
            let (start, clock) = (ContinuousClock.now, ContinuousClock())
            let bound = try binder.bind([gpu], observe: observe).count
            let middle = clock.now
            let released = try binder.release([gpu], observe: observe).count
            times["bind", default: []].append(middle - start)
            times["release", default: []].append(clock.now - middle)
            #expect(bound == 2 && released == 2)
        }
        for (what, taken) in times.sorted(by: { $0.key < $1.key }) {
            print("\(what) among 64 GPUs without the kernel's part: \(taken.sorted())")
            #expect(try #require(taken.min()) < .milliseconds(100))
        }
    }
}
