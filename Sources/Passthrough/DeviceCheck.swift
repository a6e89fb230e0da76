package import FlotillaProtocol
import HostKit
import MigrationModel

/// Which users of devices are seen.
package enum KnownUsers: Sendable {
    /// By root.
    case all
    /// Only some processes and no reservations.
    case own
    /// None: a recorded tree has no processes, domains or disks.
    case recorded
}

/// Every requirement for handing these functions to a VM, met or not. Pure but for reading `tree.sysfs`.
///
/// - Parameters:
///   - vgpu: a vGPU of this profile on them, instead of the whole function.
///   - commandLine: the running kernel's.
///   - migs: how GPUs are cut into instances, where that is known.
package func checkDevices(
    _ addresses: [PciAddress], vgpu: String?, in tree: DeviceTree, commandLine: String = "",
    migs: [PciAddress: Mig] = [:], users: KnownUsers = .all
) -> [Requirement] {
    var found = checkHost(tree, commandLine: commandLine, users)
    if users == .own {
        found.append(
            .warn(
                "host", "users", "only root sees which processes have devices and for whom they are reserved",
                remedy: "run it with sudo before you rely on what it says of users"))
    }
    for address in addresses {
        guard let device = tree[address] else {
            found.append(
                .fail(
                    address.description, "present", "this host has no PCI function \(address)",
                    remedy: "flotilla gpu list --all shows those it has"))
            continue
        }
        if let unknown = unknownObstacle(device) {
            found.append(unknown)
            continue
        }
        found.append(.pass(device.function.address, "present", device.function.text))
        if let vgpu {
            found += checkVgpu(vgpu, on: device, in: tree, migs[device.physicalFunction ?? address])
        } else {
            found += checkFunction(device, besides: addresses, in: tree, isLive: users != .recorded)
        }
        found += checkQuality(device, in: tree)
    }
    return found
}

private func checkHost(_ tree: DeviceTree, commandLine: String, _ users: KnownUsers) -> [Requirement] {
    var found = hostObstacles(tree)
    if tree.iommu {
        let groups = tree.sysfs.list("kernel/iommu_groups").count
        let units = tree.sysfs.list("class/iommu").joined(separator: ", ")
        found.append(.pass("host", "IOMMU", "on (\(units)), \(groups) groups"))
    }
    switch tree.vfio {
    case true?: found.append(.pass("host", "vfio-pci", "there for this kernel"))
    case false?: break
    case nil:
        found.append(
            .warn(
                "host", "vfio-pci",
                "not loaded when the tree was recorded, which does not tell whether the kernel has it",
                remedy: "ask on that host: modinfo vfio-pci"))
    }
    if users == .recorded {
        found.append(
            .warn(
                "host", "users", "a recorded tree does not tell which processes, domains or disks use devices",
                remedy: "run it on that host before you rely on it"))
    }
    let type1 = "module/vfio_iommu_type1/parameters"
    if tree.sysfs.text("\(type1)/allow_unsafe_interrupts") == "Y" {
        found.append(
            .warn(
                "host", "interrupt remapping",
                "vfio_iommu_type1.allow_unsafe_interrupts is on: a guest could send the host any interrupt",
                remedy: "enable interrupt remapping (x2APIC) in the firmware and take the option away"))
    }
    if let limit = tree.sysfs.number("\(type1)/dma_entry_limit"), limit < 65_535 {
        found.append(
            .warn(
                "host", "DMA mappings", "vfio_iommu_type1.dma_entry_limit is \(limit), below the default of 65535",
                remedy: "take the option out of /etc/modprobe.d: large guests run out of mappings"))
    }
    if commandLine.split(separator: " ").contains(where: { $0.hasPrefix("pcie_acs_override=") }) {
        found.append(
            .warn(
                "host", "isolation",
                "the kernel runs with pcie_acs_override: its IOMMU groups are smaller than what the hardware isolates",
                remedy: "use slots with groups of their own: a guest can reach other devices past the IOMMU"))
    }
    return found
}

private func checkFunction(
    _ device: DeviceFunction, besides: [PciAddress], in tree: DeviceTree, isLive: Bool
) -> [Requirement] {
    let subject = device.function.address
    let together = tree.together(with: device.address)
    let others = together.filter { $0.address != device.address }
    var found: [Requirement] = []
    if !others.isEmpty {
        found.append(
            .pass(
                subject, "companions", "goes together with \(others.map(\.function.text).joined(separator: ", "))"))
    }
    var obstacles = [partObstacle(device)].compactMap(\.self)
    for function in together { obstacles += handoverObstacles(of: function, consent: [], owner: nil) }
    // Without an IOMMU there are no groups; that was said of the host.
    if !tree.iommu { obstacles.removeAll { $0.requirement == "IOMMU group" } }
    let requested = Set(besides.flatMap { tree.together(with: $0).map(\.address) })
    let blockers = blockingMembers(of: together, in: tree).filter { !requested.contains($0.address) }
    obstacles += blockers.map { groupObstacle($0, of: together, in: tree, consent: []) }
    let failed = Set(obstacles.map(\.requirement))
    if !failed.contains("not a bridge") { found.append(.pass(subject, "not a bridge", "an ordinary device")) }
    if failed.contains("not a bridge") { return found + obstacles.filter { $0.requirement == "not a bridge" } }
    if !failed.contains("not the boot display") {
        found.append(
            .pass(subject, "not the boot display", device.function.isDisplay ? "another one is, or none" : "no display")
        )
    }
    if !failed.contains("free"), isLive { found.append(.pass(subject, "free", "nobody uses it")) }
    if tree.iommu && !failed.contains("IOMMU group") {
        let inside = Set(together.map(\.address))
        let rest = tree.members(of: device.function.iommuGroup).filter { !inside.contains($0.address) }
        func texts(_ devices: [DeviceFunction]) -> String { devices.map(\.function.text).joined(separator: ", ") }
        let asked = rest.filter { requested.contains($0.address) }
        let idle = rest.filter { !requested.contains($0.address) }
        let shared = [
            asked.isEmpty ? nil : "\(texts(asked)) in it goes too",
            idle.isEmpty ? nil : "\(texts(idle)) in it is no obstacle",
        ].compactMap(\.self)
        found.append(
            .pass(
                subject, "IOMMU group",
                "group \(device.function.iommuGroup)"
                    + (shared.isEmpty ? " is its own" : ": \(shared.joined(separator: "; "))")))
    }
    found += obstacles
    for function in together {
        for use in function.uses where use.kind == .dirty {
            found.append(
                .warn(
                    function.function.address, "clean", "it holds \(use.by)",
                    remedy:
                        "flotilla gpu reset \(function.function.address), or reboot (not by kexec): no other VM gets it before"
                ))
        }
    }
    if !failed.contains("driver") { found.append(.pass(subject, "driver", driverText(device, others))) }
    return found
}

private func driverText(_ device: DeviceFunction, _ others: [DeviceFunction]) -> String {
    let driver = device.function.driver
    guard isVfio(driver: driver) else {
        return driver.isEmpty ? "none: ready to bind" : "\(driver): flotilla gpu bind takes it over"
    }
    let left = others.filter { !isVfio(driver: $0.function.driver) }
    return left.isEmpty
        ? "\(driver): ready"
        : "\(driver); flotilla gpu bind takes \(left.map(\.function.text).joined(separator: ", ")) over too"
}

private func checkQuality(_ device: DeviceFunction, in tree: DeviceTree) -> [Requirement] {
    let subject = device.function.address
    let folder = "bus/pci/devices/\(device.address)"
    var found = windowObstacles(of: device)
    let memory = device.bars.filter { $0.is64bit && $0.index < 6 }.reduce(0) { $0 + $1.bytes }
    if memory > 0, !found.contains(where: { $0.verdict == .fail }) {
        found.append(.pass(subject, "memory windows", "\(size(memory)) in 64-bit BARs"))
    }
    if device.function.bridge { return found }
    found.append(
        device.resettable
            ? .pass(
                subject, "reset", "the kernel can reset it (\(tree.sysfs.text("\(folder)/reset_method") ?? "reset"))")
            : .warn(
                subject, "reset", "the kernel knows no way to reset it",
                remedy: "after one VM had it, reboot the host (not by kexec) before another gets it"))
    let nodes = tree.sysfs.list("devices/system/node").filter {
        $0.hasPrefix("node") && $0.dropFirst(4).allSatisfy(\.isNumber)
    }
    if device.function.numaNode < 0, nodes.count > 1 {
        found.append(
            .warn(
                subject, "NUMA", "the firmware does not say to which of the \(nodes.count) nodes it belongs",
                remedy: "update the firmware, or pin the VM by hand"))
    } else if device.function.numaNode >= 0 {
        found.append(.pass(subject, "NUMA", "node \(device.function.numaNode)"))
    }
    if let width = tree.sysfs.number("\(folder)/current_link_width"), width > 0,
        let most = tree.sysfs.number("\(folder)/max_link_width"), most < 64, width < most
    {
        found.append(
            .warn(
                subject, "link", "runs on \(width) of its \(most) PCIe lanes",
                remedy: "reseat the card, or move it to a wider slot"))
    }
    return found
}
