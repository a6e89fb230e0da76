package import FlotillaProtocol
import MigrationModel

/// The host's memory nodes with their CPUs; empty on a kernel without NUMA.
package func numaNodes(sysfs: Sysfs = Sysfs()) -> [NumaNode] {
    sysfs.list("devices/system/node").compactMap { name -> NumaNode? in
        guard name.hasPrefix("node"), let id = UInt32(name.dropFirst(4)) else { return nil }
        var node = NumaNode()
        node.id = id
        node.cpus = parseCPUList(sysfs.text("devices/system/node/\(name)/cpulist") ?? "")
        // "Node 0 MemTotal:       65843216 kB"
        let bytes = sysfs.bytes("devices/system/node/\(name)/meminfo") ?? []
        let total = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first { $0.contains("MemTotal:") }
        let words = total?.split(whereSeparator: \.isWhitespace) ?? []
        node.memoryBytes = (words.count >= 2 ? UInt64(words[words.count - 2]) ?? 0 : 0) * 1024
        return node
    }.sorted { $0.id < $1.id }
}

/// Throws `resourceExhausted` when a VM whose memory is pinned as it starts (all of it, as VFIO does) does not fit into what
/// is left: the kernel would look for what it could end instead, and find the largest, another VM. Or when it is to come from
/// huge pages, of which the host keeps a number, and there are not as many.
///
/// - Parameters:
///   - nodes: that the memory is bound to; empty: any.
///   - hugepages: of the kernel's default size.
///   - proc: of the same machine.
package func requireMemory(
    _ bytes: UInt64, onNodes nodes: [UInt32], hugepages: Bool = false, sysfs: Sysfs, proc: Sysfs
) throws {
    let whole = MemoryInformation(proc, "meminfo")
    let each =
        nodes.isEmpty ? [whole] : nodes.map { MemoryInformation(sysfs, "devices/system/node/node\($0)/meminfo") }
    let sizes = each.compactMap { hugepages ? $0.hugepages(of: whole.hugepage) : $0.available }
    guard sizes.count == each.count else { return }
    let left = sizes.reduce(0, +)
    guard left < bytes else { return }
    let place = nodes.map { "\($0)" }.joined(separator: ",")
    if hugepages {
        let count = (bytes - left + whole.hugepage - 1) / whole.hugepage
        throw MigrationError(
            .resourceExhausted,
            "the VM's memory of \(bytes >> 20) MiB is to come from huge pages of \(whole.hugepage >> 10) KiB, and "
                + (nodes.isEmpty ? "the host" : "memory node \(place), where its devices are,")
                + " has \(left >> 20) MiB of these free",
            hint: "have the kernel keep \(count) more (sysctl vm.nr_hugepages, or a node's "
                + "hugepages/*/nr_hugepages), then run the same command again; or leave --hugepages out")
    }
    throw MigrationError(
        .resourceExhausted,
        "with its devices the VM's memory of \(bytes >> 20) MiB is pinned when it starts, and "
            + (nodes.isEmpty ? "the host" : "memory node \(place), where these are,") + " has \(left >> 20) MiB left",
        hint: "stop what uses the host's memory, then run the same command again")
}

/// "MemFree: 1024 kB" of /proc/meminfo, "Node 0 MemFree: 1024 kB" of a node's.
private struct MemoryInformation {
    private var values: [Substring: UInt64] = [:]

    init(_ sysfs: Sysfs, _ path: String) {
        for line in String(decoding: sysfs.bytes(path) ?? [], as: UTF8.self).split(separator: "\n") {
            let words = line.split(whereSeparator: \.isWhitespace)
            guard let name = words.firstIndex(where: { $0.hasSuffix(":") }), name + 1 < words.count else { continue }
            let kibibytes = UInt64(words[name + 1]).flatMap { $0 < 1 << 50 ? $0 : nil }
            values[words[name].dropLast()] = kibibytes.map { $0 << 10 }
        }
    }

    /// Bytes of one huge page of the default size; 0 where the kernel has none.
    var hugepage: UInt64 { values["Hugepagesize"] ?? 0 }

    /// Bytes of those that nobody has and nobody was promised; a node knows of no promises.
    func hugepages(of size: UInt64) -> UInt64? {
        guard size > 0, let free = values["HugePages_Free"] else { return nil }
        let promised = values["HugePages_Rsvd"] ?? 0
        // Numbers of pages, which were taken for KiB.
        return (free - min(free, promised)) >> 10 * size
    }

    /// Free, or taken for what is on a disk as well. Nodes have no figure of the kernel's own.
    var available: UInt64? {
        if let own = values["MemAvailable"] { return own }
        guard let free = values["MemFree"] else { return nil }
        return ["Active(file)", "Inactive(file)", "SReclaimable"].reduce(free) { $0 + (values[$1] ?? 0) }
    }
}

/// "0-3,8" of the kernel. At most 8192 CPUs are listed, the kernel's own limit (CONFIG_NR_CPUS).
func parseCPUList(_ text: String) -> [UInt32] {
    text.split(separator: ",").flatMap { part -> [UInt32] in
        let ends = part.split(separator: "-").map { UInt32($0) }
        guard let first = ends.first.flatMap({ $0 }), let last = ends.last.flatMap({ $0 }), first <= last, last < 8192
        else { return [] }
        return Array(first...last)
    }
}

/// Adds what a domain's address space depends on, whose virtual function one is, and why no VM can have it.
package func addDetail(_ functions: inout [PciFunction], sysfs: Sysfs = Sysfs()) {
    for index in functions.indices where !functions[index].bridge && functions[index].classCode >> 8 != 0x06 {
        let folder = "bus/pci/devices/\(functions[index].address)"
        let bars = BaseAddress.all(functions[index], sysfs)
        functions[index].largeBarBytes = bars.filter { $0.is64bit && $0.index < 6 && $0.bytes < 1 << 48 }
            .reduce(0) { $0 + $1.bytes }
        functions[index].physicalFunction = sysfs.linkName("\(folder)/physfn") ?? ""
        functions[index].unusable = firmwareObstacle(functions[index].iommuGroup, bars, sysfs) ?? ""
    }
}

private func firmwareObstacle(_ group: Int32, _ bars: [BaseAddress], _ sysfs: Sysfs) -> String? {
    if let region = DeviceTree.firmwareRegions(group, sysfs).first {
        return "the firmware keeps memory of its IOMMU group \(group) for itself (\(region)): the kernel gives such a "
            + "group to no VM"
    }
    return bars.first(where: \.isUnplaced).map {
        "the firmware gave its \($0.text) no address"
    }
}
