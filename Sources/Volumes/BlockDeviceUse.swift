import CLinux
import Glibc
import HostKit
import MigrationModel

/// Who uses a block device, by name. The kernel's own word is an exclusive open; this says it in words, looks at
/// partitions and at what is stacked on top, and finds programs that write without a claim, as QEMU does.
enum BlockDeviceUse {
    /// nil when nothing is found.
    static func find(_ path: String) throws -> String? {
        var info = stat()
        guard stat(path, &info) == 0 else { throw systemError("stat", path) }
        let device = UInt64(info.st_rdev)
        let folder = try Files.canonical("/sys/dev/block/\(flotilla_major(device)):\(flotilla_minor(device))")
        let mounts = String(decoding: try Files.read("/proc/self/mountinfo"), as: UTF8.self)
        let partitions = try Files.list(folder).filter { Files.exists("\(folder)/\($0)/partition") }
        for part in [folder] + partitions.map({ "\(folder)/\($0)" }) {
            let node = "/dev/\(Files.name(of: part))"
            if let point = mountPoint(of: try number(of: part), in: mounts) { return "\(node) is mounted on \(point)" }
            if let writer = try writer(of: try number(of: part)) { return "\(writer) has \(node) open for writing" }
            if let holder = try Files.list("\(part)/holders").first { return "/dev/\(holder) holds \(node)" }
        }
        return nil
    }

    /// "8:17".
    private static func number(of folder: String) throws -> String {
        String(decoding: try Files.read("\(folder)/dev"), as: UTF8.self).filter { !$0.isNewline }
    }

    /// "qemu-system-x86 (process 4711)". Root sees every process, others their own.
    private static func writer(of device: String) throws -> String? {
        for process in try Files.list("/proc") where Int32(process).map({ $0 != getpid() }) == true {
            // It may end meanwhile.
            for descriptor in (try? Files.list("/proc/\(process)/fd")) ?? [] {
                let entry = "\(process)/fd/\(descriptor)"
                guard isDevice("/proc/\(entry)", device),
                    isOpenForWriting("/proc/\(process)/fdinfo/\(descriptor)")
                else { continue }
                let name = (try? Files.read("/proc/\(process)/comm")).map { String(decoding: $0, as: UTF8.self) } ?? ""
                return "\(name.filter { !$0.isNewline }) (process \(process))"
            }
        }
        return nil
    }

    /// Looks closer only at what lies in /dev: a stat of a file on a dead server would hang.
    private static func isDevice(_ link: String, _ device: String) -> Bool {
        var target = [CChar](repeating: 0, count: 256)
        let count = readlink(link, &target, target.count)
        var info = stat()
        guard count > 5, target.starts(with: "/dev/".utf8.map { CChar($0) }), stat(link, &info) == 0,
            info.st_mode & S_IFMT == S_IFBLK
        else { return false }
        return "\(flotilla_major(UInt64(info.st_rdev))):\(flotilla_minor(UInt64(info.st_rdev)))" == device
    }

    /// The third field of a line is the device, the fifth the place (proc(5)).
    private static func mountPoint(of device: String, in mounts: String) -> String? {
        for line in mounts.split(separator: "\n") {
            let fields = line.split(separator: " ")
            if fields.count > 4, fields[2] == device { return String(fields[4]) }
        }
        return nil
    }
}
