package import FlotillaProtocol
import Glibc
import HostKit
import SwiftProtobuf

/// Every PCI function of the host, in address order. `inUseBy` is filled for physical functions with virtual ones
/// and for those that a process has open through VFIO; functions of libvirt domains are joined by whoever speaks to libvirt, what the
/// host itself uses by `markUsed`.
///
package func pciInventory(
    sysfs: Sysfs = Sysfs(), holders: DeviceHolders = DeviceHolders()
) throws -> [PciFunction] {
    let addresses = sysfs.list("bus/pci/devices").compactMap(PciAddress.init).sorted()
    // An SR-IOV virtual function may sit in its parent's slot, but moves alone.
    let virtual = Set(addresses.filter { sysfs.exists("bus/pci/devices/\($0)/physfn") })
    let slots = Dictionary(grouping: addresses.filter { !virtual.contains($0) }, by: \.slotName)

    return addresses.map { address in
        let folder = "bus/pci/devices/\(address)"
        var function = PciFunction()
        function.address = address.description
        function.id = pciID(sysfs, folder)
        function.classCode = UInt32(truncatingIfNeeded: (sysfs.number("\(folder)/class") ?? 0) >> 8) & 0xffff
        function.driver = sysfs.linkName("\(folder)/driver") ?? ""
        function.iommuGroup = sysfs.linkName("\(folder)/iommu_group").flatMap { Int32($0) } ?? -1
        // Linux 6.18 tells it of displays without VGA too.
        function.bootVga =
            sysfs.number("\(folder)/boot_vga") == 1
            || function.isDisplay
                && sysfs.list("\(folder)/drm").contains { card in
                    sysfs.number("\(folder)/drm/\(card)/boot_display") == 1
                }
        function.numaNode = Int32(truncatingIfNeeded: sysfs.number("\(folder)/numa_node") ?? -1)
        function.bridge = isBridge(sysfs, folder, classCode: function.classCode)

        var companions = Set(sysfs.list(folder).compactMap(consumer))
        if !virtual.contains(address) { companions.formUnion(slots[address.slotName] ?? []) }
        companions.remove(address)
        function.companions = companions.sorted().map(\.description)

        if isVfio(driver: function.driver), let holder = holders.vfioUser(of: folder, sysfs: sysfs) {
            function.inUseBy = holder
        } else if let count = sysfs.number("\(folder)/sriov_numvfs"), count > 0 {
            function.inUseBy = "its \(count) virtual functions"
        }
        return function
    }
}

private func pciID(_ sysfs: Sysfs, _ folder: String) -> PciId {
    func field(_ name: String) -> UInt32 { UInt32(truncatingIfNeeded: sysfs.number("\(folder)/\(name)") ?? 0) }
    var id = PciId()
    id.vendor = field("vendor")
    id.device = field("device")
    id.subsystemVendor = field("subsystem_vendor")
    id.subsystemDevice = field("subsystem_device")
    id.revision = field("revision")
    return id
}

/// Header type (configuration byte 0x0e, bit 7 only says multifunction) other than 0, or class 06: the ISA bridge
/// of a chipset has a header of type 0 and vfio-pci would take it.
private func isBridge(_ sysfs: Sysfs, _ folder: String, classCode: UInt32) -> Bool {
    if classCode >> 8 == 0x06 { return true }
    return ![nil, 0, silentHeader].contains(headerType(sysfs, folder))
}

/// Of a function's configuration, without the bit that says multifunction; nil where it can't be read.
func headerType(_ sysfs: Sysfs, _ folder: String) -> UInt8? {
    sysfs.bytes("\(folder)/config", limit: 64).flatMap { $0.count > 0x0e ? $0[0x0e] & 0x7f : nil }
}

/// What the bus returns when nobody answers: all ones.
let silentHeader: UInt8 = 0x7f

/// The address in a device link's name, `consumer:pci:0000:01:00.1`: that device needs this one awake.
private func consumer(_ name: String) -> PciAddress? {
    let prefix = "consumer:pci:"
    return name.hasPrefix(prefix) ? PciAddress(String(name.dropFirst(prefix.count))) : nil
}

/// The kernel translates DMA. Off, there are no groups and a bind to vfio-pci fails without an error.
package func iommuEnabled(sysfs: Sysfs = Sysfs()) -> Bool {
    !sysfs.list("class/iommu").isEmpty && !sysfs.list("kernel/iommu_groups").isEmpty
}

/// vfio-pci is loaded, built in, or installed for the running kernel.
///
/// - Parameter modules: the running kernel's module folder.
package func vfioAvailable(sysfs: Sysfs = Sysfs(), modules: String = "/lib/modules/\(kernelRelease())") -> Bool {
    if sysfs.exists("bus/pci/drivers/vfio-pci") || sysfs.exists("module/vfio_pci") { return true }
    return ["modules.dep", "modules.builtin"].contains { list in
        guard let bytes = try? Files.read("\(modules)/\(list)") else { return false }
        return String(decoding: bytes, as: UTF8.self).contains("/vfio-pci.ko")
    }
}

/// The running kernel's version, "6.1.0-40-amd64".
package func kernelRelease() -> String {
    var names = utsname()
    guard uname(&names) == 0 else { return "" }
    return withUnsafeBytes(of: names.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}
