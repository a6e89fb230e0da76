package import FlotillaProtocol
import SwiftProtobuf

/// A physical or virtual function on which vGPUs can be made, read afresh at every call: what one offers changes as its
/// siblings fill.
package struct VgpuPlace: Sendable {
    package enum Path: String, Sendable, Codable {
        /// The kernel's mediated devices (Documentation/driver-api/vfio-mediated-device.rst).
        case mdev
        /// `nvidia/{creatable_vgpu_types,current_vgpu_type}` of NVIDIA's driver on Linux 6.8 and later.
        case vendor = "vendor-vfio"
    }

    package let function: PciAddress
    package let path: Path
    /// The function itself where it is not a virtual one.
    package let physical: PciAddress
    let sysfs: Sysfs

    var folder: String { "bus/pci/devices/\(function)" }
    var isVirtual: Bool { physical != function }

    /// Nil for a function without vGPUs, and for one bound to a VFIO driver as a whole.
    package init?(_ function: PciAddress, sysfs: Sysfs) {
        let folder = "bus/pci/devices/\(function)"
        if sysfs.exists("\(folder)/nvidia/creatable_vgpu_types") {
            path = .vendor
        } else if sysfs.exists("\(folder)/mdev_supported_types") {
            path = .mdev
        } else {
            return nil
        }
        self.function = function
        self.sysfs = sysfs
        physical = sysfs.linkName("\(folder)/physfn").flatMap(PciAddress.init) ?? function
    }

    /// What can be made now; with `available` 0 where an mdev type is known and full.
    package func types() -> [VgpuType] {
        switch path {
        case .mdev:
            let types = "\(folder)/mdev_supported_types"
            return sysfs.list(types).map { id in
                .with {
                    $0.id = id
                    $0.name = sysfs.text("\(types)/\(id)/name") ?? id
                    $0.available = UInt32(clamping: sysfs.number("\(types)/\(id)/available_instances") ?? 0)
                }
            }
        case .vendor:
            let bytes = sysfs.bytes("\(folder)/nvidia/creatable_vgpu_types") ?? []
            return parseCreatableTypes(String(decoding: bytes, as: UTF8.self))
        }
    }

    package func type(of profile: VgpuProfile) -> VgpuType? {
        types().first { VgpuProfile($0.name) == profile && $0.available > 0 }
    }

    /// Of the vendor path: the type of its one vGPU, nil for none.
    package var currentType: String? {
        guard path == .vendor, let text = sysfs.text("\(folder)/nvidia/current_vgpu_type"), text != "0", !text.isEmpty
        else { return nil }
        return text
    }

    /// The id of the GPU instance on which the driver put its one vGPU; nil without one, and where the driver does not say.
    ///
    /// Source: `nvidia/gpu_instance_id` of NVIDIA's driver, from 580 on.
    var gpuInstance: String? {
        guard currentType != nil else { return nil }
        return sysfs.number("\(folder)/nvidia/gpu_instance_id").map { "\($0)" }
    }

    /// It holds the one vGPU it can. A physical function takes as many mediated devices as its types say.
    package var isOccupied: Bool {
        switch path {
        case .vendor: currentType != nil
        case .mdev: isVirtual && !mediatedDevices.isEmpty
        }
    }

    /// It is one of these functions, or of their virtual ones.
    func isPart(of functions: Set<PciAddress>) -> Bool {
        functions.contains(function) || functions.contains(physical)
    }

    /// No vGPU lives on it.
    var isEmpty: Bool { mediatedDevices.isEmpty && currentType == nil }

    package var mediatedDevices: [String] {
        sysfs.list(folder).filter { $0.utf8.count == 36 && $0.split(separator: "-").map(\.count) == [8, 4, 4, 4, 12] }
    }
}

/// Two forms of the list are known: "NVIDIA A40-2Q 558" and "1428 : NVIDIA H200X-141C". Headings fit neither.
func parseCreatableTypes(_ text: String) -> [VgpuType] {
    text.split(separator: "\n").compactMap { line in
        let words = line.split(whereSeparator: \.isWhitespace)
        let id: Substring
        let name: String
        if let first = words.first, words.count > 2, words[1] == ":", UInt32(first) != nil {
            (id, name) = (first, words.dropFirst(2).joined(separator: " "))
        } else if let last = words.last, words.count > 1, UInt32(last) != nil {
            (id, name) = (last, words.dropLast().joined(separator: " "))
        } else {
            return nil
        }
        return .with { ($0.id, $0.name, $0.available) = (String(id), name, 1) }
    }
}
