import HostKit

/// What AMD's compute driver says of its nodes. A GPU in partitions (CPX, DPX) has one for each, whose render file belongs
/// to a platform device of its own (amdgpu_xcp): only this leads from there to the PCI device.
///
/// Source: Linux, drivers/gpu/drm/amd/amdkfd: kfd_topology.c (node_show, kfd_topology_add_device), kfd_process.c (procfs).
struct KFDNodes {
    private static let nodes = "class/kfd/kfd/topology/nodes"
    private static let processes = "class/kfd/kfd/proc"

    /// Files below /dev, and the driver's own numbers of its nodes, by slot: depending on the kernel a partition's number is
    /// in the bits of the function.
    private(set) var files: [String: Set<String>] = [:]
    private var ids: [String: Set<Int64>] = [:]
    private let users: [Int64: [String]]

    /// - Parameter proc: where procfs is mounted, which knows the names of processes; nil: they have none.
    init(_ sysfs: Sysfs, proc: String?) {
        let names = sysfs.list(Self.nodes)
        users = names.isEmpty ? [:] : Self.users(sysfs, proc)
        for name in names {
            let folder = "\(Self.nodes)/\(name)"
            let text = String(decoding: sysfs.bytes("\(folder)/properties") ?? [], as: UTF8.self)
            var properties: [Substring: UInt32] = [:]
            for line in text.split(separator: "\n") {
                let words = line.split(separator: " ")
                if words.count == 2 { properties[words[0]] = UInt32(words[1]) }
            }
            // CPUs are nodes too.
            guard let id = sysfs.number("\(folder)/gpu_id"), id != 0, let location = properties["location_id"] else {
                continue
            }
            let (bus, slot) = (location >> 8 & 0xff, location >> 3 & 0x1f)
            let key = "\(padded(properties["domain"] ?? 0, 4)):\(padded(bus, 2)):\(padded(slot, 2))"
            ids[key, default: []].insert(id)
            guard let minor = properties["drm_render_minor"], minor > 0 else { continue }
            let siblings = sysfs.list("class/drm/renderD\(minor)/device/drm")
            files[key, default: []].formUnion((siblings + ["renderD\(minor)"]).map { "/dev/dri/\($0)" })
        }
    }

    /// Processes with memory or queues on a slot's nodes, by way of /dev/kfd, which all GPUs have in common.
    func users(of slot: String) -> [String] { (ids[slot] ?? []).flatMap { users[$0] ?? [] } }

    private static func users(_ sysfs: Sysfs, _ proc: String?) -> [Int64: [String]] {
        var users: [Int64: [String]] = [:]
        for process in sysfs.list(processes) where Int32(process) != nil {
            let folder = "\(processes)/\(process)"
            var ids = Set(sysfs.list("\(folder)/queues").compactMap { sysfs.number("\(folder)/queues/\($0)/gpuid") })
            for name in sysfs.list(folder) where name.hasPrefix("vram_") {
                if let id = Int64(name.dropFirst(5)), sysfs.number("\(folder)/\(name)") ?? 0 > 0 { ids.insert(id) }
            }
            for id in ids { users[id, default: []].append(DeviceHolders.name(of: process, proc: proc)) }
        }
        return users
    }
}
