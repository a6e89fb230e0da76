import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// `gpu check` on the recorded machine with one thing changed.
@Suite struct CheckTests {
    private func check(
        _ address: String, vgpu: String? = nil, users: KnownUsers = .all, _ change: (Sysfs) throws -> Void
    ) throws -> [Requirement] {
        try withRecordedMachine { sysfs in
            try change(sysfs)
            return checkDevices([try pci(address)], vgpu: vgpu, in: try DeviceTree(sysfs), users: users)
        }
    }

    private func write(_ text: String, _ sysfs: Sysfs, _ path: String) throws {
        try Files.createDirectories(Files.parent(of: sysfs.path(path)))
        try? Files.remove(sysfs.path(path))
        try Files.writeAtomically(Array(text.utf8), to: sysfs.path(path))
    }

    @Test(arguments: [("direct", true), ("direct-relaxable", false), ("msi", false)])
    func memoryThatTheFirmwareKeeps(_ type: String, _ isRefused: Bool) throws {
        let found = try check("0000:01:00.0") { sysfs in
            let group = try #require(sysfs.linkName("bus/pci/devices/0000:01:00.0/iommu_group"))
            try write(
                "0x000000007b800000 0x000000007fffffff \(type)\n", sysfs,
                "kernel/iommu_groups/\(group)/reserved_regions")
        }
        let groups = found.filter { $0.requirement == "IOMMU group" && $0.subject == "0000:01:00.0" }
        #expect(groups.contains { $0.verdict == .fail && $0.found.contains("7b800000") } == isRefused)
        #expect(groups.contains { $0.verdict == .pass } != isRefused)
    }

    /// vfio-pci would give a VM no memory of a GPU whose memory is the CPU's too.
    @Test(arguments: ["nvgrace_gpu_vfio_pci", "vfio-pci", "nvidia"]) func coherentMemory(_ driver: String) throws {
        let tree = try MadeTree()
        let gpu = "0009:01:00.0"
        try tree.device(gpu, 0x10de, 0x2342, class: 0x0302, driver: driver, group: 4)
        let read = try DeviceTree(tree.sysfs)
        let found = checkDevices([try pci(gpu)], vgpu: nil, in: read).filter { $0.requirement == "driver" }
        let isRight = driver.hasPrefix("nvgrace")
        #expect(found.map(\.verdict) == [isRight ? .pass : .fail])
        #expect(isRight || found[0].remedy?.contains("modprobe nvgrace_gpu_vfio_pci") == true)
        let addresses = [try pci(gpu)]
        #expect(failure { _ = try devicesToPrepare(addresses, in: read, consent: []) }?.code == .failedPrecondition)
    }

    /// It is no bridge, whatever the ones say, and is listed; but it goes nowhere.
    @Test func aDeviceThatFellOffTheBus() throws {
        let gpu = "0000:01:00.0"
        let ones = { (sysfs: Sysfs) in
            try Files.writeAtomically(
                [UInt8](repeating: 0xff, count: 64), to: sysfs.path("bus/pci/devices/\(gpu)/config"))
        }
        let found = try check(gpu, ones).filter { $0.subject == gpu }
        #expect(found.map(\.requirement) == ["present"] && found[0].found.contains("does not answer"))
        try withRecordedMachine { sysfs in
            try ones(sysfs)
            #expect(try DeviceTree(sysfs)[pci(gpu)]?.function.bridge == false)
        }
    }

    /// The kernel found no room, and forgot that there is a register.
    @Test func aRegisterWithoutARoom() throws {
        let tree = try MadeTree()
        let gpu = "0000:3b:00.0"
        let placed = "0x00000000a0000000 0x00000000a0ffffff 0x0000000000040200\n"
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        try tree.device(
            gpu, 0x10de, 0x20b5, class: 0x0302, driver: "nvidia", group: 4, ["resource": placed + none + none])
        var config = [UInt8](repeating: 0, count: 64)
        try Files.writeAtomically(config, to: tree.sysfs.path("bus/pci/devices/\(gpu)/config"))
        #expect(try tree.verdicts(gpu).filter { $0.contains("windows") }.isEmpty)
        config[0x14] = 0x0c
        try Files.writeAtomically(config, to: tree.sysfs.path("bus/pci/devices/\(gpu)/config"))
        #expect(try tree.verdicts(gpu).filter { $0.contains("windows") } == ["fail \(gpu) memory windows"])
        var functions = try pciInventory(sysfs: tree.sysfs)
        addDetail(&functions, sysfs: tree.sysfs)
        #expect(functions[0].unusable == "the firmware gave its BAR 1 no address")
        // What check refuses bind refuses.
        let folder = try TemporaryFolder()
        let binder = Binder(sysfs: tree.sysfs, folder: folder.path, boot: "b", loadDriver: {})
        let refused = failure { _ = try binder.plan(bind: [pci(gpu)], observe: { try DeviceTree(tree.sysfs) }) }
        #expect(refused?.message.contains("BAR 1 of 0000:3b:00.0 (10de:20b5, nvidia) no address") == true)
    }

    /// It may be what the kernel runs in.
    @Test func memoryIsNeverHandedOver() throws {
        let tree = try MadeTree()
        try tree.device("0000:35:00.0", 0x1af4, 0x0d93, class: 0x0502, driver: "cxl_pci", group: 4)
        #expect(try tree.verdicts("0000:35:00.0").contains("fail 0000:35:00.0 not the host's memory"))
    }

    @Test func theBootDisplayWithoutVGA() throws {
        let tree = try MadeTree()
        let gpu = "0000:c4:00.0"
        try tree.device(
            gpu, 0x1002, 0x150e, class: 0x0380, driver: "amdgpu", group: 4, ["drm/card1/boot_display": "1"])
        #expect(try tree.verdicts(gpu).contains("fail \(gpu) not the boot display"))
    }

    /// Two registers whose sizes have no sum.
    @Test func registersOfAnySize() throws {
        let line = "0x0000000000000000 0xfffffffffffffff0 0x000000000014220c\n"
        let found = try check("0000:01:00.0") { sysfs in
            try write(String(repeating: line, count: 3), sysfs, "bus/pci/devices/0000:01:00.0/resource")
        }
        #expect(found.contains { $0.requirement == "present" })
        #expect(!found.contains { $0.requirement == "memory windows" })
    }

    /// The recorded virtual functions are devices of their own; with NVIDIA's vendor id they are parts.
    @Test func virtualFunctionsOfNVIDIA() throws {
        let function = "0000:03:00.1"
        #expect(try !check(function) { _ in }.contains { $0.requirement == "a whole device" })
        let nvidia = { (sysfs: Sysfs) in try self.write("0x10de\n", sysfs, "bus/pci/devices/\(function)/vendor") }
        let found = try check(function, nvidia)
        #expect(found.contains { $0.verdict == .fail && $0.requirement == "a whole device" })
        try withRecordedMachine { sysfs in
            try nvidia(sysfs)
            let tree = try DeviceTree(sysfs)
            let addresses = [try pci(function)]
            #expect(failure { try requireWhole(addresses, in: tree) }?.code == .failedPrecondition)
            #expect(failure { _ = try devicesToPrepare(addresses, in: tree, consent: []) } != nil)
        }
    }

    /// Of a recorded tree nobody can say that a device is free, nor of what the kernel could load.
    @Test func whatARecordingDoesNotTell() throws {
        let found = try check("0000:01:00.0", users: .recorded) { sysfs in
            for name in ["bus/pci/drivers/vfio-pci", "module/vfio_pci"] { try? Files.remove(sysfs.path(name)) }
        }
        #expect(found.contains { $0.requirement == "users" && $0.verdict == .warn })
        #expect(!found.contains { $0.requirement == "free" && $0.verdict == .pass })
        #expect(found.filter { $0.requirement == "vfio-pci" }.map(\.verdict) == [.warn])
    }

    /// simpledrm hangs below the display that it borrows.
    @Test func consoleOnTheFirmwaresFramebuffer() throws {
        let address = "0000:09:00.0"
        let found = try check(address) { sysfs in
            try write("1\n", sysfs, "class/vtconsole/vtcon1/bind")
            try write("(M) frame buffer device\n", sysfs, "class/vtconsole/vtcon1/name")
            try Files.createDirectories(
                sysfs.path("bus/pci/devices/\(address)/simple-framebuffer.0/graphics/fb0"))
        }
        #expect(found.contains { $0.requirement == "free" && $0.verdict == .fail && $0.found.contains("fb0") })
    }

    @Test func noEscapesOfARecording() throws {
        try withRecordedMachine { sysfs in
            try write("\u{1b}[31mevil\u{7}\n", sysfs, "bus/pci/devices/0000:09:00.0/driver_override")
            let tree = try DeviceTree(sysfs)
            #expect(tree[try pci("0000:09:00.0")]?.driverOverride == "?[31mevil?")
        }
    }

    @Test func allMediatedDevicesInOneFinding() throws {
        let machine = try VgpuMachine()
        let card = "0000:af:00.0"
        try machine.mdevGPU(card, [("nvidia-222", "GRID T4-1B", 16)])
        try machine.put("bus/pci/devices/\(card)/class", "0x030200\n")
        let uuids = (10...25).map { "11111111-2222-4333-8444-5555555555\($0)" }
        for uuid in uuids {
            try machine.kernel.write(
                uuid, to: "bus/pci/devices/\(card)/mdev_supported_types/nvidia-222/create")
        }
        var around = Surroundings()
        around.domains = [
            GPULedger.Domain(
                name: "web", migration: "", resources: [try GPUResource(mdev: uuids[3], partOf: [pci(card)])])
        ]
        func free() throws -> [Requirement] {
            try checkDevices([pci(card)], vgpu: nil, in: DeviceTree(machine.sysfs, around: around)).filter {
                $0.requirement == "free" && $0.verdict == .fail
            }
        }
        let found = try free()
        #expect(found.count == 1 && uuids.allSatisfy { found[0].found.contains($0) })
        #expect(found[0].found.contains("\(uuids[3]) of domain web"))
        #expect(found[0].remedy?.contains("each of the 16 vGPUs") == true)
        #expect(found[0].remedy?.contains("mdevctl stop --uuid \(uuids[0])") == true)
        let render = GPUOwner(domain: "render", migration: "m-2", fence: 1)
        try machine.ledger.reserve([GPUResource(mdev: uuids[5], partOf: [pci(card)])], for: render)
        around.reservations = try machine.ledger.reservations()
        let ours = try free()
        #expect(ours.count == 1 && ours[0].remedy?.hasSuffix("flotilla gpu destroy --domain render") == true)
    }
}
