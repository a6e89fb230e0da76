package import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf

/// A base address register, or the expansion ROM.
package struct BaseAddress: Sendable, Encodable, Hashable {
    /// 0 to 5; 6 is the ROM.
    package var index: Int
    package var start: UInt64
    package var bytes: UInt64
    /// I/O ports rather than memory.
    package var io: Bool
    package var is64bit: Bool
    package var prefetchable: Bool

    /// The firmware gave this window no address.
    var isUnplaced: Bool { index < 6 && start == 0 && !io }

    /// "BAR 1 (64 GiB)", without a size where nobody knows it.
    var text: String { "BAR \(index)" + (bytes == 0 ? "" : " (\(size(bytes)))") }

    /// From an attribute `resource`: a line of start, end and flags (linux/ioport.h) per register. Unused ones are left
    /// out. Lines 7 and on describe virtual functions and bridges.
    package static func read(_ text: String) -> [BaseAddress] {
        text.split(separator: "\n", omittingEmptySubsequences: false).prefix(7).enumerated().compactMap { index, line in
            let fields = line.split(separator: " ").map { UInt64($0.hasPrefix("0x") ? $0.dropFirst(2) : $0, radix: 16) }
            guard fields.count == 3, let start = fields[0], let end = fields[1], let flags = fields[2], flags != 0,
                end >= start, end - start < 1 << 48
            else { return nil }
            return BaseAddress(
                index: index, start: start, bytes: end - start + 1, io: flags & 0x100 != 0,
                is64bit: flags & 0x10_0000 != 0, prefetchable: flags & 0x2000 != 0)
        }
    }

    /// Of a function in sysfs, also those 64-bit ones of a GPU of which only its registers tell: where the kernel finds no
    /// room it forgets size and flags too (kernel: reset_resource).
    static func all(_ function: PciFunction, _ sysfs: Sysfs) -> [BaseAddress] {
        let folder = "bus/pci/devices/\(function.address)"
        var bars = read(sysfs.bytes("\(folder)/resource").map { String(decoding: $0, as: UTF8.self) } ?? "")
        guard [0x03, 0x12].contains(function.classCode >> 8), !sysfs.exists("\(folder)/physfn"),
            let config = sysfs.bytes("\(folder)/config", limit: 64), config.count >= 0x28, config[0x0e] & 0x7f == 0
        else { return bars }
        var index = 0
        while index < 6 {
            let register = config[0x10 + 4 * index]
            guard register & 7 == 4 else {
                index += 1
                continue
            }
            if !bars.contains(where: { $0.index == index }) {
                bars.append(
                    BaseAddress(
                        index: index, start: 0, bytes: 0, io: false, is64bit: true, prefetchable: register & 8 != 0))
            }
            index += 2
        }
        return bars.sorted { $0.index < $1.index }
    }
}

/// A vGPU type that a function offers.
package struct VgpuOffer: Sendable, Encodable, Hashable {
    /// "nvidia-558", or NVIDIA's number on the vendor's path.
    package var id: String
    package var name: String
    /// How many more can be made; nil where the list holds only what can be made now.
    package var available: Int?
}

/// A PCI function with everything the kernel says of it.
package struct DeviceFunction: Sendable {
    package var function: PciFunction
    package var address: PciAddress
    /// Of the configuration header: 0 for a device, 1 for a bridge, 0x7f for one that does not answer; nil where it can't be
    /// read.
    package var headerType: UInt8?
    package var bars: [BaseAddress]
    /// Empty for none.
    package var driverOverride: String
    package var physicalFunction: PciAddress?
    package var totalVirtualFunctions: Int
    package var virtualFunctions: [PciAddress]
    package var vgpuOffers: [VgpuOffer]
    /// "mdev" or "vendor-vfio"; nil when there are no vGPUs.
    package var vgpuPath: String?
    /// "enabled", "disabled"; nil when it is not known.
    package var mig: String?
    /// Memory of its IOMMU group that the firmware keeps: "0x7b800000 0x7fffffff". The kernel gives such a group to no VM
    /// (kernel: `IOMMU_RESV_DIRECT`).
    package var firmwareRegions: [String]
    /// The kernel knows a way to reset it.
    package var resettable: Bool
    package var uses: [DeviceUse]

    /// A GPU or another accelerator: class 03 (display), 12 (processing accelerator).
    package var isGPU: Bool { function.isDisplay || function.classCode >> 8 == 0x12 }

    /// Keeps its IOMMU group from being handed to a VM while it is as it is: bound to a driver that does DMA for the
    /// host (kernel: `driver_managed_dma`; before 5.19 `vfio_dev_driver_allowed`).
    package var blocksGroup: Bool { function.blocksGroup }

    package var answers: Bool { headerType != silentHeader }
}

extension PciFunction {
    /// See `DeviceFunction.blocksGroup`.
    package var blocksGroup: Bool {
        if driver.isEmpty || isVfio(driver: driver) || driver == "pci-stub" { return false }
        // A real bridge with the port driver; a chipset's ISA bridge or an NVSwitch with a driver does block.
        return !(bridge && (driver == "pcieport" || classCode == 0x0604 || classCode == 0x0609))
    }
}

/// All PCI functions of a host, or of a recorded tree.
package struct DeviceTree: Sendable {
    package var iommu: Bool
    /// Nil where a recorded tree does not tell: the driver is loaded when it is first needed.
    package var vfio: Bool?
    /// In address order.
    package var functions: [DeviceFunction]
    package let sysfs: Sysfs
    private let index: [String: Int]

    /// - Parameters:
    ///   - around: what only the running host knows.
    ///   - modules: the running kernel's module folder; nil for a recorded tree.
    package init(_ sysfs: Sysfs, around: Surroundings = Surroundings(), modules: String? = nil) throws {
        self.sysfs = sysfs
        iommu = iommuEnabled(sysfs: sysfs)
        let isThere = vfioAvailable(sysfs: sysfs, modules: modules ?? "/nonexistent")
        vfio = isThere || modules != nil ? isThere : nil
        let inventory = try pciInventory(sysfs: sysfs, holders: around.holders)
        // A copy that followed the links has no groups and no drivers, and would be misjudged.
        if let copied = inventory.first(where: {
            let group = "bus/pci/devices/\($0.address)/iommu_group"
            return $0.iommuGroup < 0 && sysfs.exists(group) && sysfs.linkPath(group) == nil
        }) {
            throw MigrationError(
                .invalidArgument, "\(sysfs.path("bus/pci/devices/\(copied.address)/iommu_group")) is no symbolic link",
                hint: "record the device tree with its links: flotilla gpu list --help says how")
        }
        let users = DeviceUsers(sysfs, around)
        functions = inventory.compactMap { function in
            guard let address = PciAddress(function.address) else { return nil }
            return Self.read(function, address, sysfs, users)
        }
        index = Dictionary(functions.enumerated().map { ($1.function.address, $0) }) { first, _ in first }
    }

    package subscript(_ address: PciAddress) -> DeviceFunction? {
        index[address.description].map { functions[$0] }
    }

    /// Members of an IOMMU group, in address order; empty for -1.
    package func members(of group: Int32) -> [DeviceFunction] {
        group < 0 ? [] : functions.filter { $0.function.iommuGroup == group }
    }

    /// Whether a function is on the way to one of these, as the controller of Intel's VMD is, which makes a PCI domain: without
    /// its driver they are gone.
    func isAbove(_ address: PciAddress, _ functions: [DeviceFunction]) -> Bool {
        functions.contains { below in
            sysfs.linkPath("bus/pci/devices/\(below.function.address)")?.split(separator: "/").dropLast()
                .contains { $0 == address.description } ?? false
        }
    }

    /// The function with all that must go with it: the whole slot and what consumes it, and what goes with those.
    package func together(with address: PciAddress) -> [DeviceFunction] {
        var seen: Set<PciAddress> = [address]
        var waiting = [address]
        while let next = waiting.popLast() {
            for text in self[next]?.function.companions ?? [] {
                if let companion = PciAddress(text), self[companion] != nil, seen.insert(companion).inserted {
                    waiting.append(companion)
                }
            }
        }
        return seen.sorted().compactMap { self[$0] }
    }

    private static func read(
        _ function: PciFunction, _ address: PciAddress, _ sysfs: Sysfs, _ users: DeviceUsers
    ) -> DeviceFunction {
        let folder = "bus/pci/devices/\(address)"
        let names = Set(sysfs.list(folder))
        let virtual = names.filter { $0.hasPrefix("virtfn") }
            .compactMap { name in Int(name.dropFirst(6)).map { ($0, name) } }.sorted { $0.0 < $1.0 }
            .compactMap { sysfs.linkName("\(folder)/\($0.1)").flatMap(PciAddress.init) }
        let enabled = names.contains("sriov_numvfs") ? Int(sysfs.number("\(folder)/sriov_numvfs") ?? 0) : 0
        let override = sysfs.text("\(folder)/driver_override") ?? ""
        let offers = vgpuOffers(address, names, sysfs)
        return DeviceFunction(
            function: function, address: address, headerType: Passthrough.headerType(sysfs, folder),
            bars: names.contains("resource") ? BaseAddress.all(function, sysfs) : [],
            driverOverride: override == "(null)" ? "" : override,
            physicalFunction: names.contains("physfn")
                ? sysfs.linkName("\(folder)/physfn").flatMap(PciAddress.init) : nil,
            totalVirtualFunctions: names.contains("sriov_totalvfs")
                ? Int(sysfs.number("\(folder)/sriov_totalvfs") ?? 0) : 0,
            virtualFunctions: virtual, vgpuOffers: offers.list, vgpuPath: offers.path, mig: nil,
            firmwareRegions: firmwareRegions(function.iommuGroup, sysfs),
            resettable: names.contains("reset") || !(sysfs.text("\(folder)/reset_method") ?? "").isEmpty,
            uses: users.uses(
                of: address, group: function.iommuGroup, driver: function.driver,
                virtualFunctions: max(virtual.count, enabled)))
    }

    /// Lines of "0x7b800000 0x7fffffff direct"; `direct-relaxable` and the others are no obstacle.
    static func firmwareRegions(_ group: Int32, _ sysfs: Sysfs) -> [String] {
        wholeText(sysfs, "kernel/iommu_groups/\(group)/reserved_regions").split(separator: "\n").compactMap { line in
            let words = line.split(separator: " ")
            return words.count == 3 && words[2] == "direct" ? words[..<2].joined(separator: " ") : nil
        }
    }

    private static func wholeText(_ sysfs: Sysfs, _ attribute: String) -> String {
        sysfs.bytes(attribute).map { String(decoding: $0, as: UTF8.self) } ?? ""
    }

    private static func vgpuOffers(_ address: PciAddress, _ names: Set<String>, _ sysfs: Sysfs)
        -> (list: [VgpuOffer], path: String?)
    {
        guard names.contains("mdev_supported_types") || names.contains("nvidia"),
            let place = VgpuPlace(address, sysfs: sysfs)
        else { return ([], nil) }
        let offers = place.types().map {
            VgpuOffer(id: $0.id, name: $0.name, available: place.path == .mdev ? Int($0.available) : nil)
        }
        return (offers, place.path.rawValue)
    }
}
