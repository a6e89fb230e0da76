import CLinux
import Glibc
import HostKit

/// Which processes hold a file below `/dev` open that leads to a PCI device: those that sysfs doesn't lead from to the
/// device, or that stand for it as a whole, by their paths (VFIO groups and devices, DRM, accelerators, framebuffers, NVIDIA's,
/// generic ones of SCSI and NVMe, InfiniBand and UIO, and, open for writing, block devices), and any other character device.
/// Best effort: other users' processes are invisible without CAP_SYS_PTRACE, and processes end while being looked at.
/// Looks at no more than 65,536 processes and 262,144 descriptors.
package struct DeviceHolders: Sendable {
    /// "process 4242 (qemu-system-x86)" by path, the first of each.
    package var byPath: [String: String] = [:]
    /// Of other character devices, by their number, "116:4": the first process that has one, which has "snd/controlC1".
    package var byNumber: [String: String] = [:]

    package init() {}

    package init(proc: String) {
        let prefixes = ["vfio/", "dri/", "accel/", "hl", "fb", "nvidia", "sg", "bsg/", "ng", "infiniband/", "uio"]
            .map { "/dev/\($0)" }
        var budget = 262_144
        var seen: Set<String> = []
        for process in ((try? Files.list(proc)) ?? []).lazy.filter({ Int32($0) != nil }).prefix(65_536) {
            guard budget > 0 else { break }
            for descriptor in ((try? Files.list("\(proc)/\(process)/fd")) ?? []).prefix(budget) {
                budget -= 1
                let file = "\(proc)/\(process)/fd/\(descriptor)"
                guard let target = linkTarget(file), target.hasPrefix("/dev/"), byPath[target] == nil else { continue }
                let isKnown = prefixes.contains(where: target.hasPrefix) || Self.isController(target)
                if isKnown
                    || Self.mayBeDisk(target) && isOpenForWriting("\(proc)/\(process)/fdinfo/\(descriptor)")
                {
                    byPath[target] = Self.name(of: process, proc: proc)
                }
                if !isKnown, seen.insert(target).inserted, let number = Self.character(file) {
                    let name = Self.name(of: process, proc: proc)
                    byNumber[number] = byNumber[number] ?? "\(name), which has \(target.dropFirst(5))"
                }
            }
        }
    }

    /// The number of an open character device.
    private static func character(_ file: String) -> String? {
        var info = stat()
        guard stat(file, &info) == 0, info.st_mode & S_IFMT == S_IFCHR else { return nil }
        return "\(flotilla_major(UInt64(info.st_rdev))):\(flotilla_minor(UInt64(info.st_rdev)))"
    }

    /// "process 4242 (Xorg)".
    static func name(of process: String, proc: String?) -> String {
        let name = proc.flatMap { try? Files.read("\($0)/\(process)/comm", limit: 4096) } ?? []
        return "process \(process) (\(String(decoding: name.prefix { $0 != 0x0a }, as: UTF8.self)))"
    }

    /// "/dev/nvme0", which takes commands for any of its disks from whoever has it open.
    private static func isController(_ path: String) -> Bool {
        path.hasPrefix("/dev/nvme") && Int(path.dropFirst(9)) != nil
    }

    /// Every disk and partition lies in /dev itself.
    private static func mayBeDisk(_ path: String) -> Bool { path != "/dev/null" && !path.dropFirst(5).contains("/") }

    /// Who has a device open through VFIO: by its group or, with IOMMUFD, the device itself.
    ///
    /// - Parameter folder: the device's in `sysfs`.
    func vfioUser(of folder: String, sysfs: Sysfs) -> String? {
        let group = sysfs.linkName("\(folder)/iommu_group").map { "/dev/vfio/\($0)" }
        let devices = sysfs.list("\(folder)/vfio-dev").map { "/dev/vfio/devices/\($0)" }
        return ([group].compactMap(\.self) + devices).compactMap { byPath[$0] }.first
    }

    /// Who holds `/dev/vfio/<group>`.
    package var groups: [Int32: String] {
        let prefix = "/dev/vfio/"
        return Dictionary(
            byPath.compactMap { path, holder in
                guard path.hasPrefix(prefix), let group = Int32(path.dropFirst(prefix.count)) else { return nil }
                return (group, holder)
            }
        ) { first, _ in first }
    }
}
