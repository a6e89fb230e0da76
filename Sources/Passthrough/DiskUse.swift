import CLinux
import Glibc
import HostKit
import Synchronization

/// Block devices in use: mounted, swap, with a device on top (md, dm), a domain's disk, open for writing, or claimed within
/// the kernel, which alone knows the mounts of other namespaces, ZFS's pools and DRBD.
struct DiskUse {
    private let sysfs: Sysfs
    private let devices: String?
    private let holders: DeviceHolders
    private var numbers: Set<String> = []
    /// Of what is used, by path: "a mounted file system".
    private var paths: [String: String] = [:]

    /// Nil for a recorded tree: it says nothing of them.
    init?(_ sysfs: Sysfs, _ around: Surroundings) {
        guard let proc = around.proc else { return nil }
        self.sysfs = sysfs
        devices = around.devices
        holders = around.holders
        // Fields of proc(5) mountinfo: id, parent, major:minor, …, "-", type, source. btrfs has a number of no device.
        for line in lines("\(proc)/self/mountinfo") {
            let fields = line.split(separator: " ").map(String.init)
            if fields.count > 2 { numbers.insert(fields[2]) }
            if let end = fields.firstIndex(of: "-"), end + 2 < fields.count {
                add(fields[end + 2], "a mounted file system")
            }
        }
        for line in lines("\(proc)/swaps").dropFirst() {
            if let path = line.split(whereSeparator: \.isWhitespace).first { add(String(path), "swap space") }
        }
        // Of several devices the mount names one.
        for id in sysfs.list("fs/btrfs") {
            for name in sysfs.list("fs/btrfs/\(id)/devices") { add("/dev/\(name)", "a mounted file system") }
        }
        // Neither claims what it is made of.
        for name in sysfs.list("class/block") where name.hasPrefix("loop") {
            if let path = sysfs.text("class/block/\(name)/loop/backing_file") { add(path, "loop device \(name)") }
        }
        let exports = "kernel/config/nvmet/subsystems"
        for subsystem in sysfs.list(exports) {
            for number in sysfs.list("\(exports)/\(subsystem)/namespaces") {
                let path = sysfs.text("\(exports)/\(subsystem)/namespaces/\(number)/device_path")
                if let path { add(path, "a namespace of the NVMe target \(subsystem)") }
            }
        }
        for domain in around.domains {
            for path in domain.disks { add(path, "domain \(domain.name)'s disk") }
        }
    }

    private mutating func add(_ path: String, _ use: String) {
        guard path.hasPrefix("/dev/") else { return }
        // Names of udev's lead to the kernel's; a file that is gone keeps its own.
        paths[devices == nil ? path : (try? Files.canonical(path)) ?? path] = use
    }

    /// nil when nothing is known.
    func use(of name: String) -> String? {
        if let number = sysfs.text("class/block/\(name)/dev"), numbers.contains(number) {
            return "a mounted file system on \(name)"
        }
        let path = "/dev/\(file(name))"
        if let use = paths[path] { return "\(use) on \(name)" }
        if let above = sysfs.list("class/block/\(name)/holders").first { return "\(above), which consists of \(name)" }
        return holders.byPath[path].map { "\($0), which writes to \(name)" }
    }

    private static let asking = Mutex(())

    /// Asks the kernel whether somebody has claimed the device, one of its partitions or the whole, by claiming it for a
    /// moment. Changes nothing, and waits for no medium.
    ///
    /// - Returns: nil when nobody has it, or when this user may not ask; a device that can't be asked is in use.
    func claim(on name: String) -> String? {
        // Paths of a multipath disk have no file of their own.
        guard let devices, sysfs.number("class/block/\(name)/hidden") != 1 else { return nil }
        let path = "\(devices)/\(file(name))"
        func unknown(_ why: String) -> String? {
            geteuid() == 0 ? "whoever has \(name): \(path) can't be asked (\(why))" : nil
        }
        var info = stat()
        guard stat(path, &info) == 0 else { return unknown(String(cString: strerror(errno))) }
        let number = "\(flotilla_major(UInt64(info.st_rdev))):\(flotilla_minor(UInt64(info.st_rdev)))"
        guard info.st_mode & S_IFMT == S_IFBLK, number == sysfs.text("class/block/\(name)/dev") else {
            return unknown("it is another device")
        }
        return Self.asking.withLock { _ in
            // Of two who ask at once one would be refused.
            let turn = try? FileLock("/run/flotilla-disks.lock")
            return withExtendedLifetime(turn) {
                let descriptor = open(path, O_RDONLY | O_EXCL | O_NONBLOCK | O_CLOEXEC)
                if descriptor >= 0 {
                    close(descriptor)
                    return nil
                }
                switch errno {
                case EBUSY:
                    return "whoever claimed \(name) in the kernel: a mount, swap, ZFS, a RAID or a conversion"
                case ENXIO, ENODEV, ENOMEDIUM: return nil  // There is nothing in it, or it is gone.
                case let code: return unknown(String(cString: strerror(code)))
                }
            }
        }
    }

    /// sysfs has `!` where the name has a slash.
    private func file(_ name: String) -> String { name.replacing("!", with: "/") }
}

private func lines(_ path: String) -> [Substring] {
    ((try? Files.read(path)).map { String(decoding: $0, as: UTF8.self) } ?? "").split(separator: "\n")
}
