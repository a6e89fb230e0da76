import HostKit

/// Which processes hold `/dev/vfio/<group>` open, as "process 4242 (qemu-system-x86)". Best effort: other users'
/// processes are invisible without CAP_SYS_PTRACE, and processes end while being looked at.
///
/// Looks at no more than 65,536 processes and 262,144 descriptors.
package func vfioHolders(proc: String = "/proc") -> [Int32: String] {
    let prefix = "/dev/vfio/"
    var holders: [Int32: String] = [:]
    var budget = 262_144
    for process in ((try? Files.list(proc)) ?? []).lazy.filter({ Int32($0) != nil }).prefix(65_536) {
        guard budget > 0 else { break }
        for descriptor in ((try? Files.list("\(proc)/\(process)/fd")) ?? []).prefix(budget) {
            budget -= 1
            guard let target = linkTarget("\(proc)/\(process)/fd/\(descriptor)"), target.hasPrefix(prefix),
                let group = Int32(target.dropFirst(prefix.count)), holders[group] == nil
            else { continue }
            let name = (try? Files.read("\(proc)/\(process)/comm", limit: 4096)) ?? []
            holders[group] = "process \(process) (\(String(decoding: name.prefix { $0 != 0x0a }, as: UTF8.self)))"
        }
    }
    return holders
}
