package import FlotillaProtocol

func poolFindings(_ manifest: Manifest, _ name: String, _ format: String, _ host: HostProfile) -> [Finding] {
    guard let pool = host.pools.first(where: { $0.name == name }) else {
        let names = host.pools.map(\.name).joined(separator: ", ")
        return [
            .blocked(
                "pool \(name)", "host \(host.name) has no pool \(name); it has \(names.isEmpty ? "none" : names)",
                remedy: "name one of the host's pools, or add it to the worker's configuration")
        ]
    }
    guard pool.writable else {
        return [
            .blocked(
                "pool \(name)", "pool \(name) of host \(host.name) (\(pool.path)) can't be used: \(pool.problem)",
                remedy: "check owner, mode and mount of the folder and of those above it, or choose another pool")
        ]
    }
    let isStaged = manifest.keepsSourceFiles
    let needed = bytesNeeded(manifest.disks, format: format, isStaged: isStaged)
    let disks = isStaged ? "the disks and the VMDK files kept beside them" : "the disks"
    let free = "pool \(name) of host \(host.name) has \(size(pool.freeBytes)) free"
    if needed.expected > pool.freeBytes {
        return [
            .blocked(
                "pool \(name)", "\(free); \(disks) need about \(size(needed.expected))",
                remedy: isStaged
                    ? "free some space, choose another pool, or leave --staged out"
                    : "free some space or choose another pool")
        ]
    }
    guard needed.worst > pool.freeBytes else { return [] }
    return [
        .warning(
            "pool \(name)", "\(free); \(disks) can grow to \(size(needed.worst))",
            remedy: "watch the pool: a guest stops when its disk can't grow")
    ]
}

/// What the disks that are not converted yet will take, in bytes.
///
/// `worst` is every disk full: its capacity, plus for qcow2 the mapping tables (8 bytes per 64 KiB cluster and as
/// much again for reference counts, below 1/2048). `expected` is the same for raw, since a guest writes to it without
/// asking. For qcow2 it is what the source's bytes unpack to, at most `worst`: a streamOptimized or compressed source
/// counts three times its length (Linux and Windows system disks compress to between a half and a third), any other
/// its own length. Where the length is not known yet, the capacity. The compressed file that is kept with `isStaged`
/// is expected to take half the capacity; where nothing compresses, its markers make it longer, below 1/64.
package func bytesNeeded(_ disks: [Disk], format: String, isStaged: Bool) -> (expected: UInt64, worst: UInt64) {
    var expected: UInt64 = 0
    var worst: UInt64 = 0
    for disk in disks where !disk.hasTarget || disk.target.path.isEmpty {
        let overhead = format == "qcow2" ? disk.capacityBytes / 2048 + (1 << 20) : 0
        let full = saturating(disk.capacityBytes, overhead)
        worst = saturating(worst, full)
        if isStaged {
            worst = saturating(worst, saturating(disk.capacityBytes, disk.capacityBytes / 64))
            expected = saturating(expected, disk.capacityBytes / 2)
        }
        let length = disk.source.length
        guard format == "qcow2", length > 0 else {
            expected = saturating(expected, full)
            continue
        }
        let factor: UInt64 = disk.source.variant == "streamOptimized" ? 3 : 1
        let (unpacked, overflow) = length.multipliedReportingOverflow(by: factor)
        expected = saturating(expected, overflow ? full : min(full, unpacked))
    }
    return (expected, worst)
}

extension Manifest {
    /// Whether its source's URL says so (`staged=1`).
    package var keepsSourceFiles: Bool {
        guard source.kind == .vsphere, let question = source.url.firstIndex(of: "?") else { return false }
        return source.url[question...].dropFirst().split(separator: "&").contains("staged=1")
    }
}

private func saturating(_ a: UInt64, _ b: UInt64) -> UInt64 {
    let (sum, overflow) = a.addingReportingOverflow(b)
    return overflow ? .max : sum
}

/// "1.5 GiB".
func size(_ bytes: UInt64) -> String {
    var (value, unit) = (Double(bytes), 0)
    while value >= 1024, unit < 5 { (value, unit) = (value / 1024, unit + 1) }
    let tenths = (value * 10).rounded() / 10
    let text = tenths == tenths.rounded() ? "\(Int(tenths))" : "\(tenths)"
    return "\(text) \(["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"][unit])"
}
