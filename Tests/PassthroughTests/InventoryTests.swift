import FlotillaProtocol
import Glibc
import HostKit
import Passthrough
import TestKit
import Testing

@Suite struct InventoryTests {
    @Test func readsARecordedMachine() throws {
        try withRecordedMachine { sysfs in
            #expect(iommuEnabled(sysfs: sysfs))
            #expect(vfioAvailable(sysfs: sysfs))
            var holders = DeviceHolders()
            holders.byPath = ["/dev/vfio/12": "process 7 (qemu)"]
            let functions = Dictionary(
                uniqueKeysWithValues: try pciInventory(sysfs: sysfs, holders: holders).map {
                    ($0.address, $0)
                })
            #expect(functions.count == 30)

            let gpu = try #require(functions["0000:01:00.0"])
            #expect(gpu.id.text == "1234:1111" && gpu.classCode == 0x0380 && gpu.driver == "bochs-drm")
            #expect(gpu.id.subsystemVendor == 0x1af4 && gpu.id.revision == 2)
            #expect(gpu.iommuGroup == 11 && !gpu.bootVga && !gpu.bridge && gpu.numaNode == -1 && gpu.isDisplay)
            #expect(gpu.companions == ["0000:01:00.1"] && gpu.inUseBy == "")
            #expect(functions["0000:01:00.1"]?.companions == ["0000:01:00.0"])

            #expect(functions["0000:0b:00.0"]?.bootVga == true)
            // A root port by its header, the ISA bridge by its class alone.
            #expect(functions["0000:00:02.0"]?.bridge == true && functions["0000:00:1f.0"]?.bridge == true)
            #expect(functions["0000:00:1f.2"]?.bridge == false)
            // Virtual functions share their parent's slot and move alone.
            #expect(functions["0000:03:00.0"]?.companions == [] && functions["0000:03:00.1"]?.companions == [])
            #expect(functions["0000:03:00.0"]?.inUseBy == "its 2 virtual functions")
            #expect(functions["0000:02:00.0"]?.inUseBy == "process 7 (qemu)")
        }
    }

    /// With IOMMUFD nobody opens the group.
    @Test func aDeviceThatIsOpenByItself() throws {
        try withRecordedMachine { sysfs in
            let address = "0000:02:00.0"
            try Files.createDirectories(sysfs.path("bus/pci/devices/\(address)/vfio-dev/vfio0"))
            var around = Surroundings()
            around.holders.byPath = ["/dev/vfio/devices/vfio0": "process 7 (qemu)"]
            let functions = try pciInventory(sysfs: sysfs, holders: around.holders)
            #expect(functions.first { $0.address == address }?.inUseBy == "process 7 (qemu)")
            var again = try pciInventory(sysfs: sysfs).filter { $0.address == address }
            markUsed(&again, sysfs: sysfs, around: around)
            #expect(again.map(\.inUseBy) == [""])
            markUsed(&again, sysfs: sysfs, around: around, vfio: true)
            #expect(again.map(\.inUseBy) == ["process 7 (qemu)"])
        }
    }

    /// Memory that the firmware keeps, and a window without an address.
    @Test func whatTheFirmwareMakesUnusable() throws {
        try withRecordedMachine { sysfs in
            let window = "0x0000000000000000 0x00000003ffffffff 0x000000000014220c\n"
            for (path, text) in [
                ("kernel/iommu_groups/11/reserved_regions", "0x7b800000 0x7fffffff direct\n"),
                ("bus/pci/devices/0000:06:00.0/resource", window),
            ] {
                try? Files.remove(sysfs.path(path))
                try Files.writeAtomically(Array(text.utf8), to: sysfs.path(path))
            }
            var functions = try pciInventory(sysfs: sysfs)
            addDetail(&functions, sysfs: sysfs)
            let why = Dictionary(uniqueKeysWithValues: functions.map { ($0.address, $0.unusable) })
            #expect(why["0000:01:00.0"]?.contains("0x7b800000 0x7fffffff") == true)
            #expect(why["0000:06:00.0"]?.contains("BAR 0 (16 GiB) no address") == true)
            #expect(why.values.count { !$0.isEmpty } == 3)
        }
        let host = gpuHost {
            $0.pciFunctions[1].unusable = "its memory is the firmware's"
            $0.pciFunctions[2].inUseBy = "domain web"
        }
        let found = matchDevices([passthrough("gpu0", 0x10de, 0x20f1)], on: host)
        #expect(found.devices.joined().isEmpty)
        #expect(found.findings.contains { $0.message.contains("its memory is the firmware's") })
    }

    @Test func emptyTreeHasNothing() throws {
        try withFolder { folder in
            let sysfs = Sysfs(root: folder)
            #expect(try pciInventory(sysfs: sysfs).isEmpty)
            #expect(!iommuEnabled(sysfs: sysfs))
            #expect(!vfioAvailable(sysfs: sysfs, modules: "\(folder)/modules"))
            try Files.createDirectories("\(folder)/modules")
            try Files.writeAtomically(
                Array("kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n".utf8),
                to: "\(folder)/modules/modules.dep")
            #expect(vfioAvailable(sysfs: sysfs, modules: "\(folder)/modules"))
        }
    }

    @Test func oddAttributesAndConsumersAreRead() throws {
        try withFolder { folder in
            let device = "\(folder)/bus/pci/devices/10000:e1:00.0"
            try Files.createDirectories("\(device)/consumer:pci:10000:e1:00.1")
            try Files.createDirectories("\(folder)/bus/pci/devices/not-an-address")
            try Files.writeAtomically(Array("garbage\n".utf8), to: "\(device)/vendor")
            let function = try #require(try pciInventory(sysfs: Sysfs(root: folder)).first)
            #expect(function.address == "10000:e1:00.0" && function.id.vendor == 0 && function.iommuGroup == -1)
            #expect(function.companions == ["10000:e1:00.1"] && function.numaNode == -1)
        }
    }

    @Test func findsWhoHoldsAGroup() throws {
        try withFolder { folder in
            try Files.createDirectories("\(folder)/4242/fd")
            try Files.createDirectories("\(folder)/self/fd")
            try Files.writeAtomically(Array("qemu-system-x86\n".utf8), to: "\(folder)/4242/comm")
            for (name, target) in [("3", "/dev/vfio/vfio"), ("4", "/dev/vfio/42"), ("5", "socket:[1]")] {
                #expect(symlink(target, "\(folder)/4242/fd/\(name)") == 0)
            }
            #expect(DeviceHolders(proc: folder).groups == [42: "process 4242 (qemu-system-x86)"])
        }
        #expect(DeviceHolders(proc: "/nonexistent").groups.isEmpty)
    }

    /// Files of DRM's accelerators, and of habanalabs before there were any.
    @Test(arguments: [("accel/accel0", "accel/accel0"), ("habanalabs", "hl0")])
    func findsWhoHasAnAccelerator(_ kind: String, _ file: String) throws {
        let tree = try MadeTree()
        try tree.device("0000:19:00.0", 0x1da3, 0x1020, class: 0x1200, driver: "habanalabs", group: 4)
        if kind == "habanalabs" {
            let folder = try tree.folder.sub("class/habanalabs/hl0")
            try Files.writeAtomically(Array("0000:19:00.0\n".utf8), to: "\(folder)/pci_addr")
        } else {
            _ = try tree.folder.sub("bus/pci/devices/0000:19:00.0/\(kind)")
        }
        let proc = try tree.folder.sub("proc")
        let open = try tree.folder.sub("proc/42/fd")
        #expect(symlink("/dev/\(file)", "\(open)/3") == 0)
        try Files.writeAtomically(Array("python3\n".utf8), to: "\(proc)/42/comm")
        var around = Surroundings()
        around.holders = DeviceHolders(proc: proc)
        let read = try DeviceTree(tree.sysfs, around: around)
        #expect(read.functions.map { $0.uses.map(\.by) } == [["process 42 (python3)"]])
    }

    /// A partition's files belong to a platform device; both of the kernel's numbers for it, and what /dev/kfd alone holds.
    @Test(arguments: [0x8300, 0x8301, 0x1000_8300]) func findsWhoHasAPartition(_ location: UInt32) throws {
        let tree = try MadeTree()
        for (bus, group) in [("83", 4), ("84", 5)] {
            try tree.device("0000:\(bus):00.0", 0x1002, 0x74a1, class: 0x1200, driver: "amdgpu", group: group)
        }
        func put(_ path: String, _ text: String) throws {
            try Files.createDirectories(Files.parent(of: tree.sysfs.path(path)))
            try Files.writeAtomically(Array(text.utf8), to: tree.sysfs.path(path))
        }
        for (node, id, text) in [
            (0, 0, "cpu_cores_count 64\nlocation_id 0\ndomain 0\ndrm_render_minor 0\n"),
            (1, 51, "cpu_cores_count 0\nlocation_id \(location)\ndomain 0\ndrm_render_minor 129\n"),
            (2, 52, "cpu_cores_count 0\nlocation_id \(0x8400)\ndomain 0\ndrm_render_minor 130\n"),
        ] {
            try put("class/kfd/kfd/topology/nodes/\(node)/gpu_id", "\(id)\n")
            try put("class/kfd/kfd/topology/nodes/\(node)/properties", text)
        }
        _ = try tree.folder.sub("class/drm/renderD129/device/drm/card7")
        let proc = try tree.folder.sub("proc")
        for (process, file) in [(42, "dri/renderD129"), (43, "dri/card7"), (44, "kfd")] {
            let open = try tree.folder.sub("proc/\(process)/fd")
            #expect(symlink("/dev/\(file)", "\(open)/3") == 0)
            try Files.writeAtomically(Array("python3\n".utf8), to: "\(proc)/\(process)/comm")
        }
        var around = Surroundings()
        around.holders = DeviceHolders(proc: proc)
        around.proc = proc
        func users() throws -> [[String]] {
            try DeviceTree(tree.sysfs, around: around).functions.map { $0.uses.map(\.by) }
        }
        let open = ["process 42 (python3)", "process 43 (python3)"]
        #expect(try users() == [open, []])
        try put("class/kfd/kfd/proc/44/vram_51", "0\n")
        try put("class/kfd/kfd/proc/44/vram_52", "4096\n")
        #expect(try users() == [open, ["process 44 (python3)"]])
        try put("class/kfd/kfd/proc/44/queues/0/gpuid", "51\n")
        #expect(try users() == [open + ["process 44 (python3)"], ["process 44 (python3)"]])
    }

    @Test(arguments: [
        ("0000:3b:00.0", true), ("10000:e1:1f.7", true), ("3b:00.0", false), ("0000:3b:20.0", false),
        ("0000:3b:00.8", false),
        ("0000:3b:00", false), ("", false), ("0000:3b:00.0 ", false), ("-000:3b:00.0", false), ("0000:+b:00.0", false),
    ])
    func parsesAddresses(_ text: String, _ valid: Bool) {
        #expect((PciAddress(text) != nil) == valid && PciAddress(text).map { $0.description == text } != false)
    }
}
