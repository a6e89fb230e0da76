import MigrationModel
import Passthrough

extension GPUListing {
    /// A tree of groups, and what is worth knowing of each function below it.
    var lines: [String] {
        var lines: [String] = []
        if !iommu { lines.append("The IOMMU is off: nothing can be handed to a VM (flotilla gpu prepare).") }
        if groups.isEmpty { lines.append("No GPU here (--all shows other devices).") }
        let all = groups.flatMap(\.functions)
        // Virtual functions offer what their GPU does: it is said there, once.
        let parts = Dictionary(grouping: all.filter { $0.vgpu != nil }) { $0.physicalFunction ?? "" }
        let listed = Set(all.map(\.address))
        for group in groups {
            let count = group.functions.filter { !$0.bridge }.count
            let title = group.group.map { "IOMMU group \($0)" } ?? (iommu ? "in no IOMMU group" : "no IOMMU groups")
            lines.append("\(title)\(group.group != nil && count > 1 ? ", \(count) functions" : "")")
            let last = group.functions.count - 1
            for (index, function) in group.functions.enumerated() {
                lines.append("\(index == last ? "└─" : "├─") \(function.headline)")
                for detail in function.details + vgpuDetails(function, parts, listed) {
                    lines.append("\(index == last ? "  " : "│ ")    \(detail)")
                }
            }
        }
        if namesFrom == nil, !groups.isEmpty {
            lines.append("Names are unknown: \(PciNames.files[0]) is missing (Debian: apt install pci.ids).")
        }
        return lines
    }

    private func vgpuDetails(
        _ function: Function, _ parts: [String: [Function]], _ listed: Set<String>
    ) -> [String] {
        if let physical = function.physicalFunction, listed.contains(physical) { return [] }
        func text(_ type: VgpuOffer) -> String { "  \(type.name.isEmpty ? type.id : type.name) (\(type.id))" }
        var details: [String] = []
        if let vgpu = function.vgpu {
            details.append("vGPU types (\(vgpu.path)):")
            details += vgpu.types.map { text($0) + ($0.available.map { ", \($0) left" } ?? "") }
        }
        guard let parts = parts[function.address], let path = parts[0].vgpu?.path else { return details }
        let offers = parts.flatMap { $0.vgpu?.types ?? [] }
        var types: [String] = []
        for type in offers.map(text) where !types.contains(type) { types.append(type) }
        details.append("vGPU types (\(path), on \(parts.count) virtual function\(parts.count == 1 ? "" : "s")):")
        return details
            + types.map { type in "\(type), free on \(offers.count { text($0) == type && $0.available != 0 })" }
    }
}

extension GPUListing.Function {
    /// "0000:3b:00.0  NVIDIA Corporation GA100 [A100 PCIe 40GB]  [10de:20f1]  3D controller  nvidia".
    fileprivate var headline: String {
        let name = [vendor, device].compactMap(\.self).joined(separator: " ")
        var parts = [address]
        if !name.isEmpty { parts.append(name) }
        parts.append("[\(id)]")
        parts.append(className ?? "class \(classCode)")
        parts.append(driver.map { "driver \($0)" } ?? (bridge ? "" : "no driver"))
        if bridge { parts.append("(bridge: stays with the host)") }
        return parts.filter { !$0.isEmpty }.joined(separator: "  ")
    }

    fileprivate var details: [String] {
        if bridge { return [] }
        var details: [String] = []
        if let subsystem { details.append("board \(subsystem) [\(subsystemId ?? "")]") }
        if !answers { details.append("does not answer: flotilla gpu check \(address)") }
        if bootVga { details.append("the boot display") }
        for use in usedBy { details.append("\(use.kind == .dirty ? "not reset:" : "used by") \(use.by)") }
        if let driverOverride { details.append("driver_override \(driverOverride)") }
        if !companions.isEmpty { details.append("goes together with \(companions.joined(separator: ", "))") }
        var facts: [String] = []
        if let numaNode { facts.append("NUMA node \(numaNode)") }
        let memory = bars.filter { !$0.io && $0.index < 6 && $0.bytes > 0 }.map {
            "\(byteText($0.bytes))\($0.is64bit ? " 64-bit" : "")\($0.prefetchable ? " prefetchable" : "")"
        }
        if !memory.isEmpty { facts.append("BARs \(memory.joined(separator: ", "))") }
        if !resettable { facts.append("no reset") }
        if !facts.isEmpty { details.append(facts.joined(separator: " · ")) }
        if let physicalFunction { details.append("virtual function of \(physicalFunction)") }
        if let sriov {
            let some = sriov.virtualFunctions
            details.append(
                "SR-IOV: \(some.count) of \(sriov.total) virtual functions"
                    + (some.isEmpty ? "" : " (\(some.prefix(4).joined(separator: ", "))\(some.count > 4 ? ", …" : ""))")
            )
        }
        if let mig { details.append("MIG \(mig)") }
        return details
    }
}
