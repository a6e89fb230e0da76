import FlotillaProtocol
import HostKit
import MigrationModel

/// What the person who asks for a bind takes upon themselves. A bridge, a domain's device, a mounted disk and an open VFIO
/// group can't be had with any of these.
package struct Consent: OptionSet, Sendable {
    package let rawValue: Int
    package init(rawValue: Int) { self.rawValue = rawValue }

    /// Unrelated members of the IOMMU group may be taken from their drivers too.
    package static let group = Consent(rawValue: 1)
    /// The kernel's text console may go dark.
    package static let console = Consent(rawValue: 2)
    /// The display the firmware booted with may go.
    package static let bootVGA = Consent(rawValue: 4)
    /// Processes and network interfaces may lose it.
    package static let use = Consent(rawValue: 8)
}

/// The functions that change drivers together.
package struct Handover: Sendable {
    /// As asked.
    package var requested: [PciAddress]
    /// With their slots and consumers, in address order.
    package var functions: [DeviceFunction]
    /// Unrelated members of their IOMMU groups that have to go too, with what goes with those.
    package var groupMembers: [DeviceFunction]

    package var all: [DeviceFunction] { (functions + groupMembers).sorted { $0.address < $1.address } }

    /// - Throws: `failedPrecondition` for everything that speaks against it, all in one message. Nothing was changed.
    init(
        binding addresses: [PciAddress], in tree: DeviceTree, consent: Consent, owner: GPUOwner?
    ) throws {
        try self.init(addresses, in: tree)
        try refuse(hostObstacles(tree))
        var obstacles: [Requirement] = []
        let mine = Set(functions.map(\.address))
        let blockers = blockingMembers(of: functions, in: tree).filter { !mine.contains($0.address) }
        let staying = consent.contains(.group) ? blockers.filter { tree.isAbove($0.address, functions) } : blockers
        for blocker in staying {
            obstacles.append(groupObstacle(blocker, of: functions, in: tree, consent: consent))
        }
        let going = Set(blockers.map(\.address)).subtracting(staying.map(\.address))
        let more = Set(going.flatMap { tree.together(with: $0).map(\.address) }).subtracting(mine)
        groupMembers = more.sorted().compactMap { tree[$0] }
        for function in all {
            obstacles += handoverObstacles(of: function, consent: consent, owner: owner) + windowObstacles(of: function)
        }
        try refuse(obstacles)
    }

    /// The asked functions with what goes with them; judges nothing.
    init(_ addresses: [PciAddress], in tree: DeviceTree) throws {
        for address in addresses where tree[address] == nil {
            throw MigrationError(
                .failedPrecondition, "this host has no PCI function \(address)",
                hint: "flotilla gpu list --all shows those it has")
        }
        requested = Array(Set(addresses)).sorted()
        let together = Set(addresses.flatMap { tree.together(with: $0).map(\.address) })
        functions = together.sorted().compactMap { tree[$0] }
        groupMembers = []
    }
}

func refuse(_ obstacles: [Requirement]) throws {
    guard !obstacles.isEmpty else { return }
    var remedies: [String] = []
    for remedy in obstacles.compactMap(\.remedy) where !remedies.contains(remedy) { remedies.append(remedy) }
    throw MigrationError(
        .failedPrecondition, obstacles.map(\.found).joined(separator: "; "), hint: remedies.joined(separator: "; "))
}

/// Members of the functions' IOMMU groups whose driver keeps the group from going to a VM.
func blockingMembers(of functions: [DeviceFunction], in tree: DeviceTree) -> [DeviceFunction] {
    let mine = Set(functions.map(\.address))
    return Set(functions.map(\.function.iommuGroup)).sorted().flatMap { tree.members(of: $0) }.filter {
        $0.blocksGroup && !mine.contains($0.address)
    }
}

/// - Parameter consent: to anything but the group. What speaks against taking the blocker too is told with it.
func groupObstacle(
    _ blocker: DeviceFunction, of functions: [DeviceFunction], in tree: DeviceTree, consent: Consent
) -> Requirement {
    let (group, address) = (blocker.function.iommuGroup, blocker.function.address)
    let sharer = functions.first { $0.function.iommuGroup == group }?.function.address ?? "it"
    var remedy = "move the card to a slot with a group of its own"
    if !blocker.function.bridge, !tree.isAbove(blocker.address, functions) {
        let own = Set(functions.map(\.address))
        let obstacles = tree.together(with: blocker.address).filter { !own.contains($0.address) }
            .flatMap { handoverObstacles(of: $0, consent: consent, owner: nil) }
        let reasons = obstacles.map { $0.found + ($0.remedy.map { " (\($0))" } ?? "") }
        remedy +=
            reasons.isEmpty
            ? ", or agree with --with-group that \(address) is taken from the host too"
            : "; \(address) can't be taken from the host too as it is: \(reasons.joined(separator: "; "))"
    }
    return .fail(
        sharer, "IOMMU group", "\(sharer) shares IOMMU group \(group) with \(blocker.function.text)", remedy: remedy)
}

/// What stands against any handover on this host.
func hostObstacles(_ tree: DeviceTree) -> [Requirement] {
    if !tree.iommu {
        return [
            .fail(
                "host", "IOMMU",
                "the IOMMU of this host is off (no IOMMU groups), so no device can be handed to a VM: the kernel would "
                    + "take the bind without an error and not do it",
                remedy: "enable \(isARM(tree.sysfs, cpuinfo: nil) ? "the SMMU" : "VT-d or AMD-Vi") in the firmware, "
                    + "then `flotilla gpu prepare` and reboot")
        ]
    }
    if tree.vfio == false {
        return [
            .fail(
                "host", "vfio-pci", "this host has no vfio-pci driver for its kernel \(kernelRelease())",
                remedy: "install the kernel's full module package (Debian: linux-image-amd64, not -cloud-)")
        ]
    }
    return []
}

/// Of a function that was taken out just now or answers no more, or of a recorded tree with holes, nobody can say that
/// it is no bridge.
func unknownObstacle(_ device: DeviceFunction) -> Requirement? {
    let function = device.function
    if !device.answers {
        return .fail(
            function.address, "present",
            "\(function.text) does not answer: its configuration reads as ones, as of a device that fell off the bus",
            remedy: "journalctl -k tells when it stopped; turn the host off and on, and look at its slot and cables")
    }
    guard function.id.vendor == 0 || (device.headerType == nil && function.classCode == 0) else { return nil }
    return .fail(
        function.address, "present",
        "sysfs does not say what \(function.address) is: its vendor, or both its class and configuration, can't be read",
        remedy: "if it was not taken out just now, the recorded device tree is not whole: record it again, as root")
}

/// What stands against taking this function from the host, beyond what is agreed to.
func handoverObstacles(of device: DeviceFunction, consent: Consent, owner: GPUOwner?) -> [Requirement] {
    let (function, address) = (device.function, device.function.address)
    let natural = naturalObstacles(of: device, consent: consent)
    guard natural.allSatisfy({ $0.requirement == "not the boot display" }) else { return natural }
    var obstacles = natural + [variantObstacle(device)].compactMap(\.self)
    if function.iommuGroup < 0 {
        obstacles.append(
            .fail(
                address, "IOMMU group", "\(function.text) is in no IOMMU group: the IOMMU does not cover it",
                remedy: "check the firmware's settings for DMA remapping"))
    }
    if let regions = device.firmwareRegions.first {
        obstacles.append(
            .fail(
                address, "IOMMU group",
                "the firmware keeps memory of group \(function.iommuGroup) for itself (\(regions)): the kernel gives such "
                    + "a group to no VM",
                remedy: "take the slot out of the firmware's reserved memory (RMRR, IVMD) by the vendor's tool"))
    }
    return obstacles + useObstacles(of: device, consent: consent, owner: owner)
}

/// A VM sees only registers that have a place in the host's address space.
func windowObstacles(of device: DeviceFunction) -> [Requirement] {
    device.bars.filter(\.isUnplaced).map { bar in
        .fail(
            device.function.address, "memory windows",
            "the firmware gave \(bar.text) of \(device.function.text) no address",
            remedy: "enable \"Above 4G decoding\" (and Resizable BAR if need be) in the firmware")
    }
}

/// vfio-pci takes any device, but gives a VM nothing of the memory that some have beside their BARs.
///
/// - Parameter isAtBoot: whichever driver has it now.
func variantObstacle(_ device: DeviceFunction, isAtBoot: Bool = false) -> Requirement? {
    let (function, address) = (device.function, device.function.address)
    guard let driver = variantDriver(of: function), isAtBoot || function.driver != driver else { return nil }
    return .fail(
        address, "driver",
        "\(function.text) shares its memory with the CPU: a VM gets that from the driver \(driver) alone, to which this "
            + "binds nothing",
        remedy: "bind it by hand before: modprobe \(driver), then echo \(driver) > /sys/bus/pci/devices/\(address)/"
            + "driver_override, unbind it from its driver and echo \(address) > /sys/bus/pci/drivers_probe")
}

/// Of what the function is, whatever the host does with it now: no device that can be told, a bridge, memory, the boot
/// display.
func naturalObstacles(of device: DeviceFunction, consent: Consent) -> [Requirement] {
    let (function, address) = (device.function, device.function.address)
    if let unknown = unknownObstacle(device) { return [unknown] }
    if let header = device.headerType, header != 0 {
        return [
            .fail(
                address, "not a bridge",
                "\(function.text) is a bridge (header type \(header)), which is never handed over",
                remedy: "name the device behind it")
        ]
    }
    if function.bridge {
        return [
            .fail(
                address, "not a bridge",
                "\(function.text) is a bridge (class \(padded(function.classCode, 4))), which is never handed over",
                remedy: "name another device")
        ]
    }
    // A CXL expander may be the memory that the kernel runs in.
    if function.classCode >> 8 == 0x05 {
        return [
            .fail(
                address, "not the host's memory",
                "\(function.text) is memory of the host (class \(padded(function.classCode, 4))), which is never handed over",
                remedy: "name another device")
        ]
    }
    guard function.bootVga, !consent.contains(.bootVGA) else { return [] }
    return [
        .fail(
            address, "not the boot display",
            "\(function.text) is the display the host booted with (boot_vga): its console would go with it",
            remedy: "make another adapter (the board's BMC) the primary display in the firmware, or agree with "
                + "--force-boot-vga")
    ]
}

/// NVIDIA's virtual functions are nothing without its driver and a vGPU; others' are devices of their own.
func partObstacle(_ device: DeviceFunction) -> Requirement? {
    guard let gpu = device.physicalFunction, device.vgpuPath != nil || device.function.id.vendor == 0x10de else {
        return nil
    }
    return .fail(
        device.function.address, "a whole device",
        "\(device.function.text) is a part of \(gpu) that only a vGPU can be made on",
        remedy: "flotilla gpu check \(gpu) --vgpu PROFILE")
}

/// Throws `failedPrecondition` for functions that no VM can use as they are.
package func requireWhole(_ addresses: [PciAddress], in tree: DeviceTree) throws {
    try refuse(addresses.compactMap { tree[$0].flatMap(partObstacle) })
}

func useObstacles(of device: DeviceFunction, consent: Consent, owner: GPUOwner?) -> [Requirement] {
    let vgpus = device.uses.filter { $0.kind == .vgpu }
    // Who has a part as one of these is named with it.
    let named = Set(vgpus.compactMap(\.owner?.domain))
    let others = device.uses.filter { use in
        use.kind != .vgpu && !(use.isOfPart && use.owner.map { named.contains($0.domain) } ?? false)
    }
    let obstacles: [Requirement] = others.compactMap { use in
        let found = "\(device.function.text) is in use by \(use.by)"
        func fail(_ remedy: String) -> Requirement { .fail(device.function.address, "free", found, remedy: remedy) }
        switch use.kind {
        case .domain, .reservation:
            if let owner, let holder = use.owner, holder.isSame(as: owner) || holder.domain == owner.domain {
                return nil
            }
            return fail("undeploy that domain, or take the device out of its definition")
        case .vfio: return fail("stop the virtual machine that has it")
        case .virtualFunctions:
            // NVIDIA's are for vGPUs alone.
            return fail(
                device.function.id.vendor == 0x10de
                    ? "remove them first, or make vGPUs on it"
                    : "remove them first, or hand over a virtual function instead")
        case .dirty, .vgpu: return nil
        case .disk: return fail("unmount or take out the disk first")
        case .console:
            return consent.contains(.console)
                ? nil
                : fail("move the console (for example `fbcon=map:99` at boot), or agree with --force-console")
        case .process:
            // NVIDIA's driver waits in the kernel, for good, until the last user is gone.
            if device.function.driver.hasPrefix("nvidia") { return fail("end that process first") }
            return consent.contains(.use) ? nil : fail("end that process, or agree with --force-in-use")
        case .network: return consent.contains(.use) ? nil : fail("set it down first, or agree with --force-in-use")
        }
    }
    return (vgpuObstacle(vgpus, on: device).map { [$0] } ?? []) + obstacles
}

/// All of them, whose each is, and how to destroy one.
private func vgpuObstacle(_ vgpus: [DeviceUse], on device: DeviceFunction) -> Requirement? {
    guard let first = vgpus.first(where: \.isReserved) ?? vgpus.first else { return nil }
    let address = device.function.address
    let texts = vgpus.map { use in use.by + (use.owner.map { " of domain \($0.domain)" } ?? "") }
    let command =
        if first.isReserved, let owner = first.owner {
            "flotilla gpu destroy --domain \(owner.domain)"
        } else if let uuid = first.by.split(separator: " ").last.map(String.init), isUUID(uuid) {
            "mdevctl stop --uuid \(uuid)"
        } else {
            "echo 0 > /sys/bus/pci/devices/\(address)/nvidia/current_vgpu_type"
        }
    let vms = vgpus.contains { $0.owner != nil } ? "shut down or undeploy the domains that have them, then " : ""
    let what = vgpus.count == 1 ? "it" : "each of the \(vgpus.count) vGPUs, the first"
    return .fail(
        address, "free", "\(device.function.text) is in use by \(texts.joined(separator: ", "))",
        remedy: "\(vms)destroy \(what) with: \(command)")
}
