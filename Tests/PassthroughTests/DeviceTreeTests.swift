import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// Makes device trees that no machine at hand has.
struct MadeTree {
    let folder: TemporaryFolder
    var sysfs: Sysfs { Sysfs(root: folder.path) }

    init(iommu: Bool = true) throws {
        folder = try TemporaryFolder("bus/pci/devices", "bus/pci/drivers/vfio-pci")
        if iommu { _ = try folder.sub("class/iommu/dmar0") }
    }

    func device(
        _ address: String, _ vendor: Int, _ device: Int, class code: Int, driver: String = "", group: Int? = nil,
        header: UInt8 = 0, _ attributes: [String: String] = [:]
    ) throws {
        let path = try folder.sub("bus/pci/devices/\(address)")
        var all = [
            "vendor": "0x\(padded(vendor, 4))", "device": "0x\(padded(device, 4))", "class": "0x\(padded(code, 4))00",
        ]
        all.merge(attributes) { $1 }
        for (name, text) in all {
            try Files.createDirectories(Files.parent(of: "\(path)/\(name)"))
            try Files.writeAtomically(Array("\(text)\n".utf8), to: "\(path)/\(name)")
        }
        try Files.writeAtomically([UInt8](repeating: 0, count: 14) + [header, 0], to: "\(path)/config")
        if !driver.isEmpty { try link("\(path)/driver", "../../drivers/\(driver)") }
        if let group {
            _ = try folder.sub("kernel/iommu_groups/\(group)")
            try link("\(path)/iommu_group", "../../../../kernel/iommu_groups/\(group)")
        }
    }

    func link(_ path: String, _ target: String) throws {
        try FileManager.default.createSymbolicLink(atPath: path, withDestinationPath: target)
    }

    func verdicts(
        _ addresses: String..., vgpu: String? = nil, around: Surroundings = Surroundings()
    ) throws -> [String] {
        try checkDevices(addresses.map { try pci($0) }, vgpu: vgpu, in: DeviceTree(sysfs, around: around)).filter {
            $0.verdict != .pass
        }
        .map { "\($0.verdict.rawValue) \($0.subject) \($0.requirement)" }
    }
}

@Suite struct DeviceTreeTests {
    /// Intel's VMD: without its driver the domain that it makes is gone, and what was to be handed over with it.
    @Test func aControllerAboveADeviceStays() throws {
        let tree = try MadeTree()
        try tree.device("0000:00:0e.0", 0x8086, 0x467f, class: 0x0104, driver: "vmd", group: 9)
        try tree.device("10000:e2:00.0", 0x10de, 0x26b9, class: 0x0302, driver: "nvidia", group: 9)
        let place = "bus/pci/devices/10000:e2:00.0"
        let real = "devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e2:00.0"
        _ = try tree.folder.sub(Files.parent(of: real))
        try FileManager.default.moveItem(atPath: tree.sysfs.path(place), toPath: tree.sysfs.path(real))
        try tree.link(tree.sysfs.path(place), "../../../\(real)")
        let (gpu, state) = (try pci("10000:e2:00.0"), try TemporaryFolder())
        let binder = Binder(
            sysfs: tree.sysfs, kernel: FixtureKernel(tree.sysfs), folder: state.path, boot: "b", loadDriver: {})
        for consent in [Consent.group, []] {
            let error = failure {
                try binder.plan(bind: [gpu], consent: consent) { try DeviceTree(tree.sysfs) }
            }
            #expect(error?.message.contains("shares IOMMU group 9 with 0000:00:0e.0") == true)
            #expect(error?.hint?.contains("--with-group") == false, "\(error?.hint ?? "")")
        }
    }

    @Test func aGroupWithoutACS() throws {
        let tree = try MadeTree()
        let reset = ["reset": ""]
        try tree.device("10000:e0:01.0", 0x8086, 0x2030, class: 0x0604, driver: "pcieport", group: 7, header: 1)
        try tree.device("10000:e1:00.0", 0x10de, 0x2230, class: 0x0300, driver: "nvidia", group: 7, reset)
        try tree.device("10000:e1:00.1", 0x10de, 0x1aef, class: 0x0403, driver: "snd_hda_intel", group: 7, reset)
        try tree.device("10000:e2:00.0", 0x10de, 0x2230, class: 0x0300, driver: "nvidia", group: 7, reset)
        #expect(try tree.verdicts("10000:e1:00.0") == ["fail 10000:e1:00.0 IOMMU group"])
        // Both cards of the group together are fine.
        #expect(try tree.verdicts("10000:e1:00.0", "10000:e2:00.0") == [])
        #expect(try tree.verdicts("10000:e0:01.0") == ["fail 10000:e0:01.0 not a bridge"])
    }

    @Test func anNVSwitchInTheGroupBlocksIt() throws {
        let tree = try MadeTree()
        try tree.device("0000:3b:00.0", 0x10de, 0x20b0, class: 0x0302, driver: "nvidia", group: 3, ["reset": ""])
        try tree.device("0000:3c:00.0", 0x10de, 0x1af1, class: 0x0680, driver: "nvidia-nvswitch", group: 3)
        #expect(try tree.verdicts("0000:3b:00.0") == ["fail 0000:3b:00.0 IOMMU group"])
        let error = failure {
            try Binder(sysfs: tree.sysfs, folder: "\(tree.folder.path)/state", boot: "b", loadDriver: {})
                .bind([pci("0000:3b:00.0")], consent: [.group]) { try DeviceTree(tree.sysfs) }
        }
        #expect(error?.message.contains("0000:3c:00.0 (10de:1af1, nvidia-nvswitch) is a bridge (class 0680)") == true)
    }

    @Test func noIOMMUIsSaidOnce() throws {
        let tree = try MadeTree(iommu: false)
        try tree.device("0000:3b:00.0", 0x10de, 0x20b0, class: 0x0302, driver: "nvidia", ["reset": ""])
        #expect(try tree.verdicts("0000:3b:00.0") == ["fail host IOMMU"])
    }

    @Test func bareDevicesAreJudged() throws {
        let tree = try MadeTree()
        _ = try tree.folder.sub("bus/pci/devices/0000:01:00.0")
        _ = try tree.folder.sub("kernel/iommu_groups/1")
        #expect(
            try tree.verdicts("0000:01:00.0", "0000:02:00.0") == [
                "fail 0000:01:00.0 present", "fail 0000:02:00.0 present",
            ])
        // Without a class and a configuration it might be a bridge.
        try tree.device("0000:03:00.0", 0x10de, 0x2204, class: 0x0300, driver: "nvidia", group: 3)
        let folder = "bus/pci/devices/0000:03:00.0"
        try Files.remove(tree.sysfs.path("\(folder)/config"))
        #expect(try tree.verdicts("0000:03:00.0") == ["warn 0000:03:00.0 reset"])
        try Files.remove(tree.sysfs.path("\(folder)/class"))
        #expect(try tree.verdicts("0000:03:00.0") == ["fail 0000:03:00.0 present"])
        let error = failure {
            try Binder(sysfs: tree.sysfs, folder: "\(tree.folder.path)/state", boot: "b", loadDriver: {})
                .bind([pci("0000:03:00.0")]) { try DeviceTree(tree.sysfs) }
        }
        #expect(error?.code == .failedPrecondition && error?.message.contains("does not say what") == true)
    }

    /// A consumer card with USB-C beside its root port, and two cards of which one is bound by half.
    @Test func whatGoesTogetherIsToldTogether() throws {
        let tree = try MadeTree()
        try tree.device("0000:00:01.0", 0x8086, 0xa70d, class: 0x0604, driver: "pcieport", group: 2, header: 1)
        let drivers = ["nvidia", "snd_hda_intel", "xhci_hcd", "nvidia-gpu"]
        for (number, (code, driver)) in zip([0x0300, 0x0403, 0x0c03, 0x0c80], drivers).enumerated() {
            try tree.device(
                "0000:01:00.\(number)", 0x10de, 0x2684 + number, class: code, driver: driver, group: 2, ["reset": ""])
        }
        func found(_ addresses: String...) throws -> [String: String] {
            let found = try checkDevices(addresses.map { try pci($0) }, vgpu: nil, in: DeviceTree(tree.sysfs))
            #expect(found.allSatisfy { $0.verdict == .pass })
            return Dictionary(found.filter { $0.subject == addresses[0] }.map { ($0.requirement, $0.found) }) { $1 }
        }
        // Whichever function is asked for.
        let usb = try found("0000:01:00.2")
        #expect(usb["companions"]?.contains("0000:01:00.0 (10de:2684, nvidia), 0000:01:00.1 (") == true)
        #expect(usb["IOMMU group"] == "group 2: 0000:00:01.0 (8086:a70d, pcieport) in it is no obstacle")

        for bus in ["03", "04"] {
            try tree.device(
                "0000:\(bus):00.0", 0x10de, 0x1db4, class: 0x0302, driver: "nvidia", group: 12, ["reset": ""])
        }
        #expect(
            try found("0000:03:00.0", "0000:04:00.0")["IOMMU group"]
                == "group 12: 0000:04:00.0 (10de:1db4, nvidia) in it goes too")

        try tree.device("0000:0c:00.0", 0x1002, 0x744c, class: 0x0300, driver: "vfio-pci", group: 20, ["reset": ""])
        try tree.device(
            "0000:0c:00.1", 0x1002, 0xab30, class: 0x0403, driver: "snd_hda_intel", group: 21, ["reset": ""])
        #expect(
            try found("0000:0c:00.0")["driver"]
                == "vfio-pci; flotilla gpu bind takes 0000:0c:00.1 (1002:ab30, snd_hda_intel) over too")
    }

    @Test func whoIsNotRootIsToldSo() throws {
        let tree = try MadeTree()
        try tree.device("0000:01:00.0", 0x10de, 0x2204, class: 0x0300, group: 1, ["reset": ""])
        let found = checkDevices([try pci("0000:01:00.0")], vgpu: nil, in: try DeviceTree(tree.sysfs), users: .own)
        #expect(found.filter { $0.verdict != .pass }.map(\.requirement) == ["users"])
    }

    @Test func aCopyWithoutLinksIsNotJudged() throws {
        let tree = try MadeTree()
        try tree.device("0000:01:00.0", 0x10de, 0x2204, class: 0x0300)
        _ = try tree.folder.sub("bus/pci/devices/0000:01:00.0/iommu_group")
        let error = failure { try DeviceTree(tree.sysfs) }
        #expect(error?.message.hasSuffix("0000:01:00.0/iommu_group is no symbolic link") == true)
    }

    @Test func qualityIsWarnedOf() throws {
        let tree = try MadeTree()
        for node in ["node0", "node1"] { _ = try tree.folder.sub("devices/system/node/\(node)") }
        let unassigned = "0x0000000000000000 0x00000003ffffffff 0x000000000014220c"
        try tree.device(
            "0000:3b:00.0", 0x10de, 0x20b0, class: 0x0302, group: 3,
            ["resource": unassigned, "numa_node": "-1", "current_link_width": "8", "max_link_width": "16", "reset": ""])
        #expect(
            try tree.verdicts("0000:3b:00.0") == [
                "fail 0000:3b:00.0 memory windows", "warn 0000:3b:00.0 NUMA", "warn 0000:3b:00.0 link",
            ])
        let bar = try #require(try DeviceTree(tree.sysfs)[pci("0000:3b:00.0")]?.bars.first)
        #expect(bar.bytes == 16 << 30 && bar.is64bit && bar.prefetchable && !bar.io)
    }

    @Test func vgpuProfilesAreFoundOnVirtualFunctions() throws {
        let tree = try MadeTree()
        try tree.device(
            "0000:41:00.0", 0x10de, 0x2235, class: 0x0302, driver: "nvidia", group: 5,
            ["sriov_totalvfs": "32", "reset": ""])
        #expect(try tree.verdicts("0000:41:00.0", vgpu: "grid_a40-2q") == ["fail 0000:41:00.0 virtual functions"])
        for (index, address) in ["0000:41:00.4", "0000:41:00.5"].enumerated() {
            try tree.device(
                address, 0x10de, 0x2235, class: 0x0302, driver: "nvidia", group: 6 + index,
                [
                    "nvidia/creatable_vgpu_types": "NVIDIA A40-1Q 557\nNVIDIA A40-2Q 558",
                    "nvidia/current_vgpu_type": index == 0 ? "558" : "0",
                ])
            try tree.link("\(tree.folder.path)/bus/pci/devices/0000:41:00.0/virtfn\(index)", "../\(address)")
            try tree.link("\(tree.folder.path)/bus/pci/devices/\(address)/physfn", "../0000:41:00.0")
        }
        #expect(try tree.verdicts("0000:41:00.0", vgpu: "grid_a40-2q") == [])
        #expect(try tree.verdicts("0000:41:00.0", vgpu: "grid_a40-8q") == ["fail 0000:41:00.0 profile"])
        let read = try DeviceTree(tree.sysfs)
        let busy = try #require(read[pci("0000:41:00.4")])
        let physical = try pci("0000:41:00.0")
        #expect(busy.uses.map(\.by) == ["a vGPU of type 558"] && busy.physicalFunction == physical)
        #expect(read[physical]?.virtualFunctions.count == 2)
        // The whole GPU can't go while its parts are in use.
        #expect(try tree.verdicts("0000:41:00.0") == ["fail 0000:41:00.0 free"])
        #expect(try tree.verdicts("0000:41:00.4").contains("fail 0000:41:00.4 free"))
        // Another domain's part is no obstacle, the whole is.
        var around = Surroundings()
        for (function, isWhole) in [("0000:41:00.4", false), ("0000:41:00.0", true)] {
            let resource = GPUResource(function: try pci(function), sysfs: tree.sysfs)
            around.domains = [GPULedger.Domain(name: "web", migration: "", resources: [resource])]
            let verdicts = try tree.verdicts("0000:41:00.0", vgpu: "grid_a40-2q", around: around)
            #expect(verdicts.contains("fail 0000:41:00.0 free") == isWhole)
            #expect(try tree.verdicts("0000:41:00.0", around: around).contains("fail 0000:41:00.0 free"))
        }
        // One that holds a vGPU offers none.
        try Files.writeAtomically(
            [], to: tree.sysfs.path("bus/pci/devices/0000:41:00.4/nvidia/creatable_vgpu_types"))
        let holding = try checkDevices([pci("0000:41:00.4")], vgpu: "a40-2q", in: DeviceTree(tree.sysfs))
        let profile = try #require(holding.first { $0.requirement == "profile" })
        #expect(profile.verdict == .fail && profile.found.contains("in use by a vGPU of type 558"))
        #expect(profile.remedy?.contains("another virtual function of 0000:41:00.0") == true)
    }

    /// What a physical function has, its types count.
    @Test(arguments: [12, 0]) func mediatedDevicesBesideOthers(_ left: Int) throws {
        let tree = try MadeTree()
        let (gpu, uuid) = ("0000:af:00.0", "4b20d080-1b54-4048-85b3-a6a62d165c01")
        let type = "mdev_supported_types/nvidia-222"
        try tree.device(
            gpu, 0x10de, 0x1eb8, class: 0x0302, driver: "nvidia", group: 5,
            ["\(type)/name": "GRID T4-1Q", "\(type)/available_instances": "\(left)", "\(uuid)/x": "", "reset": ""])
        var around = Surroundings()
        let mine = GPUResource(mdev: uuid, partOf: [try pci(gpu)])
        around.domains = [GPULedger.Domain(name: "web", migration: "", resources: [mine])]
        let expected = left > 0 ? [] : ["fail \(gpu) profile"]
        #expect(try tree.verdicts(gpu, vgpu: "t4-1q", around: around) == expected)
    }

    @Test func namesComeFromTheFile() throws {
        let folder = try TemporaryFolder()
        let text =
            "# c\n10de  NVIDIA Corporation\n\t20b0  GA100 [A100]\n\t\t10de 134f  A100-SXM4\n\t20b1  Other\nC 03  Display controller\n\t02  3D controller\n"
        try Files.writeAtomically(Array(text.utf8), to: "\(folder.path)/pci.ids")
        let wanted = PciNames.Wanted(vendor: 0x10de, device: 0x20b0, subsystemVendor: 0x10de, subsystemDevice: 0x134f)
        let names = PciNames(for: [wanted], files: ["/nonexistent", "\(folder.path)/pci.ids"])
        #expect(names.vendor(0x10de) == "NVIDIA Corporation" && names.device(0x10de, 0x20b0) == "GA100 [A100]")
        #expect(names.subsystem(wanted) == "A100-SXM4" && names.device(0x10de, 0x20b1) == nil)
        #expect(names.className(0x0302) == "3D controller" && names.className(0x0380) == "Display controller")
        #expect(PciNames(for: [wanted], files: ["/nonexistent"]).file == nil)
    }

    @Test func sixtyFourDevicesAreReadInTime() throws {
        let tree = try MadeTree()
        for slot in 0..<64 {
            try tree.device(
                "0000:\(padded(slot + 1, 2)):00.0", 0x10de, 0x20b0, class: 0x0302, driver: "nvidia", group: slot,
                [
                    "resource": String(
                        repeating: "0x0000000080000000 0x0000000080ffffff 0x0000000000040200\n", count: 13),
                    "numa_node": "\(slot / 32)", "reset": "",
                ])
        }
        if ProcessInfo.processInfo.environment["FLOTILLA_KEEP_TREE"] != nil {
            _ = try Program.run("/bin/cp", ["-a", tree.folder.path, "/tmp/flotilla-64-devices"])
        }
        let clock = ContinuousClock()
        let took = try (0..<5).map { _ in
            try clock.measure {
                let read = try DeviceTree(tree.sysfs)
                _ = PciNames(for: [PciNames.Wanted(vendor: 0x10de, device: 0x20b0)])
                #expect(read.functions.count == 64)
            }
        }
        print("64 devices: \(took.sorted()[2])")
        // Less than 150 ms on a quiet machine.
        #expect(try #require(took.min()) < .seconds(1.5))
    }
}
