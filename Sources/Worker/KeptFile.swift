import DiskImage
import HostKit

/// Tells which file of a pool a task kept there: written down in the task's folder before the file gets its name, so that
/// another process can take it away when nobody wants it any more.
struct KeptFile {
    private static let suffix = ".kept"

    private let mark: String
    private let name: String
    private let identity: String

    /// - Parameters:
    ///   - path: the file in the task's folder.
    ///   - name: what it will be called in the pool.
    init(_ path: String, name: String) throws {
        (mark, self.name) = (path + Self.suffix, name)
        identity = try Self.identity(path)
    }

    /// What was written down of a file that was in the task's folder; nil when nothing was.
    init?(of path: String) throws {
        guard Files.exists(path + Self.suffix) else { return nil }
        mark = path + Self.suffix
        let lines = String(decoding: try Files.read(mark), as: UTF8.self).split(separator: "\n").map(String.init)
        guard lines.count == 2 else { return nil }
        (name, identity) = (lines[0], lines[1])
    }

    func save() throws { try Files.writeAtomically(Array("\(name)\n\(identity)\n".utf8), to: mark) }

    /// Whether the file at `path` is that one, as it was.
    func isThere(_ path: String) throws -> Bool { try Files.isRegular(path) && Self.identity(path) == identity }

    /// Removes what a task kept in the pool. What was written to since is somebody's, and stays.
    static func removeAll(workDirectory: String, from pool: String) throws {
        for each in try Files.list(workDirectory) where each.hasSuffix(suffix) {
            guard let kept = try KeptFile(of: "\(workDirectory)/\(each.dropLast(suffix.count))") else { continue }
            let path = "\(pool)/\(Files.name(of: kept.name))"
            guard try kept.isThere(path) else { continue }
            try Files.remove(path)
            try Files.synchronizeDirectory(of: path)
        }
    }

    /// Without the device, whose number may change over a reboot.
    private static func identity(_ path: String) throws -> String {
        let identity = try FileIdentity(path: path)
        return "\(identity.inode) \(identity.size) \(identity.modifiedNanoseconds)"
    }
}
