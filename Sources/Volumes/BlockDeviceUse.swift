import CLinux
import Glibc
import HostKit
import MigrationModel

/// Who uses a block device, by name. The kernel's own word is an exclusive open; this says it in words, and looks at
/// partitions and at what is stacked on top.
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
            if let holder = try Files.list("\(part)/holders").first { return "/dev/\(holder) holds \(node)" }
        }
        return nil
    }

    /// "8:17".
    private static func number(of folder: String) throws -> String {
        String(decoding: try Files.read("\(folder)/dev"), as: UTF8.self).filter { !$0.isNewline }
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
