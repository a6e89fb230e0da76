package import FlotillaProtocol

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

/// "0-3,8" of the kernel. At most 8192 CPUs are listed, the kernel's own limit (CONFIG_NR_CPUS).
func parseCPUList(_ text: String) -> [UInt32] {
    text.split(separator: ",").flatMap { part -> [UInt32] in
        let ends = part.split(separator: "-").map { UInt32($0) }
        guard let first = ends.first.flatMap({ $0 }), let last = ends.last.flatMap({ $0 }), first <= last, last < 8192
        else { return [] }
        return Array(first...last)
    }
}

/// Adds what a domain's address space depends on, and whose virtual function one is.
package func addDetail(_ functions: inout [PciFunction], sysfs: Sysfs = Sysfs()) {
    for index in functions.indices where !functions[index].bridge && functions[index].classCode >> 8 != 0x06 {
        let folder = "bus/pci/devices/\(functions[index].address)"
        functions[index].largeBarBytes = largeBarBytes(sysfs, folder)
        functions[index].physicalFunction = sysfs.linkName("\(folder)/physfn") ?? ""
    }
}

private func largeBarBytes(_ sysfs: Sysfs, _ folder: String) -> UInt64 {
    BaseAddress.read(String(decoding: sysfs.bytes("\(folder)/resource") ?? [], as: UTF8.self))
        .filter { $0.is64bit && $0.index < 6 && $0.bytes < 1 << 48 }.reduce(0) { $0 + $1.bytes }
}
