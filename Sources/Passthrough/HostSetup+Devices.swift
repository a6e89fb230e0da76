import FlotillaProtocol
import HostKit
import MigrationModel

/// The functions that shall wait at vfio-pci from the next boot on, with all that goes with these.
///
/// The host would lose them for good, so what it uses them for counts as with a bind at once. What a VM has is no obstacle:
/// it gets them the same way after the boot.
///
/// - Throws: `failedPrecondition` for everything that speaks against it, all in one message.
package func devicesToPrepare(
    _ addresses: [PciAddress], in tree: DeviceTree, consent: Consent
) throws -> [DeviceFunction] {
    let devices = try Handover(addresses, in: tree).functions
    try requireWhole(devices.map(\.address), in: tree)
    try refuse(
        devices.flatMap { device in
            var kept = device
            kept.uses.removeAll { use in
                switch use.kind {
                case .domain, .reservation, .dirty, .vfio: true
                // Nobody waits for the end of a process: the boot is it.
                case .process: consent.contains(.use)
                case .console, .virtualFunctions, .vgpu, .network, .disk: false
                }
            }
            return naturalObstacles(of: device, consent: consent)
                + [variantObstacle(device, isAtBoot: true), virtualObstacle(device)].compactMap(\.self)
                + useObstacles(of: kept, consent: consent, owner: nil)
        })
    return devices
}

private func virtualObstacle(_ device: DeviceFunction) -> Requirement? {
    guard let physical = device.physicalFunction else { return nil }
    return .fail(
        device.function.address, "there at boot",
        "\(device.function.text) is a virtual function, which is not there at boot",
        remedy:
            "have a unit of your own write \(physical)/sriov_numvfs at boot; flotilla gpu bind, or the deploy, takes "
            + "the function then")
}

/// Whether a machine's CPU is one of Arm's architecture: by its IOMMU's driver (arm-smmu, arm-smmu-v3), its CPUs' registers,
/// or its /proc/cpuinfo.
///
/// - Parameter cpuinfo: of the same machine; nil where only its device tree was recorded.
package func isARM(_ sysfs: Sysfs, cpuinfo: String?) -> Bool {
    sysfs.list("class/iommu").contains { $0.hasPrefix("smmu") }
        || Files.exists(sysfs.path("devices/system/cpu/cpu0/regs/identification/midr_el1"))
        || cpuinfo?.contains("CPU implementer") == true
}

/// The maker of a machine's CPU: by its host bridges, its IOMMU's driver, or its /proc/cpuinfo. Nil when none of them says.
///
/// - Parameter cpuinfo: of the same machine; nil where only its device tree was recorded.
package func isAMD(_ sysfs: Sysfs, cpuinfo: String?) -> Bool? {
    for name in sysfs.list("bus/pci/devices").sorted()
    where (sysfs.number("bus/pci/devices/\(name)/class") ?? 0) >> 8 == 0x0600 || name == "0000:00:00.0" {
        switch sysfs.number("bus/pci/devices/\(name)/vendor") {
        case 0x1022: return true
        case 0x8086: return false
        default: continue
        }
    }
    let units = sysfs.list("class/iommu")
    if units.contains(where: { $0.hasPrefix("ivhd") }) { return true }
    if units.contains(where: { $0.hasPrefix("dmar") }) { return false }
    return cpuinfo.flatMap { $0.contains("AuthenticAMD") ? true : $0.contains("GenuineIntel") ? false : nil }
}
