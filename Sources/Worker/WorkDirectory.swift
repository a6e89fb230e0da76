import Convert
import HostKit
import Messaging
import MigrationModel

/// A task's place in a pool for what is not finished: `<pool>/.flotilla/<task>/<fence>`, on the file system where the
/// finished disks go. Only the largest fence's folder is ever worked in.
struct WorkDirectory: Sendable {
    let pool: String
    let task: String

    private var root: String { "\(pool)/.flotilla" }
    private var path: String { "\(root)/\(task)" }

    /// The fence's folder. What an older attempt on this host left is taken over by renaming its folder, after which
    /// nothing can reach it under the old fence.
    func adopt(fence: UInt64) throws -> String {
        let folder = "\(path)/\(fence)"
        do {
            try Files.createDirectories(path, mode: 0o700)
        } catch let error as MigrationError where error.code == .notFound {
            // Another task just removed the empty folder above.
            try Files.createDirectories(path, mode: 0o700)
        }
        let others = try Files.list(path).compactMap { UInt64($0) }.filter { $0 != fence }.sorted()
        if let newer = others.last, newer > fence {
            throw MigrationError(.aborted, "\(task): fence \(newer) works in \(path) already, this is \(fence)")
        }
        if !Files.exists(folder) {
            if let latest = others.last {
                try Files.move(folder: "\(path)/\(latest)", to: folder)
            } else {
                try Files.createDirectories(folder, mode: 0o700)
                try Files.synchronizeDirectory(of: folder)
            }
        }
        for old in others { try Files.remove("\(path)/\(old)") }
        return folder
    }

    /// The fence's folder, for work on this very source. What was made from another goes first, images that were published
    /// and never told of as well: nothing else would tell that they are of the past.
    func adopt(fence: UInt64, of source: String) throws -> String {
        let folder = try adopt(fence: fence)
        let mark = "\(folder)/source"
        if Files.exists(mark), try Files.read(mark) == Array(source.utf8) { return folder }
        try DiskConversion.removePublished(workDirectory: folder, from: pool)
        for name in try Files.list(folder) { try Files.remove("\(folder)/\(name)") }
        try Files.writeAtomically(Array(source.utf8), to: mark)
        return folder
    }

    /// - Parameter keepsResult: whether the images that its conversions published stay.
    func remove(keepsResult: Bool = true) throws {
        // "..", or nothing, would be far more than a task's folder.
        guard TaskCall.isIdentifier(task) else { throw MigrationError(.invalidArgument, "'\(task)' is no task id") }
        guard Files.exists(root) else { return }
        if !keepsResult, Files.exists(path) {
            for fence in try Files.list(path) where UInt64(fence) != nil {
                try DiskConversion.removePublished(workDirectory: "\(path)/\(fence)", from: pool)
            }
        }
        try Files.remove(path)
        // Stays while other tasks have folders in it.
        try Files.removeDirectoryIfEmpty(root)
    }
}
