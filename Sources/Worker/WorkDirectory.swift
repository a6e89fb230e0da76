import Convert
import Deploy
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
        try removeResults(folder)
        for name in try Files.list(folder) { try Files.remove("\(folder)/\(name)") }
        try Files.writeAtomically(Array(source.utf8), to: mark)
        return folder
    }

    /// - Parameter keepsResult: whether the images that its conversions published stay.
    func remove(keepsResult: Bool = true) throws {
        // "..", or nothing, would be far more than a task's folder.
        guard TaskCall.isIdentifier(task) else { throw MigrationError(.invalidArgument, "'\(task)' is no task id") }
        guard Files.isDirectory(pool) else {
            throw MigrationError(
                .unavailable, "pool folder \(pool) is not there, or can't be looked at",
                hint: "mount it: what is left of \(task) there is removed then")
        }
        guard try Files.isThere(root) else { return }
        if try !keepsResult && Files.isThere(path) {
            for fence in try Files.list(path) where UInt64(fence) != nil {
                try removeResults("\(path)/\(fence)")
            }
        }
        try Files.remove(path)
        // Stays while other tasks have folders in it.
        try Files.removeDirectoryIfEmpty(root)
    }

    /// Removes what work in the folder has put into the pool.
    private func removeResults(_ folder: String) throws {
        try DiskConversion.removePublished(workDirectory: folder, from: pool)
        try KeptFile.removeAll(workDirectory: folder, from: pool)
    }
}

/// A worker's pools as they were when it began.
struct WorkPools: Sendable {
    struct Pool: Sendable {
        var path: String
        /// Whether it was a file system of its own: without that, the folder below would look as if nothing were left.
        var isMounted: Bool
    }

    var pools: [Pool]

    init(_ pools: [Pool]) { self.pools = pools }

    init(_ folders: [PoolFolder]) {
        pools = folders.map { Pool(path: $0.path, isMounted: Files.isMountPoint($0.path)) }
    }

    /// Removes what a task left in any of them. One that is away keeps none of the others; it is thrown at the end.
    func remove(_ task: String, keepsResult: Bool) throws {
        var failure: (any Error)?
        for pool in pools {
            do {
                guard !pool.isMounted || Files.isMountPoint(pool.path) else {
                    throw MigrationError(
                        .unavailable, "nothing is mounted at pool folder \(pool.path) any more",
                        hint: "mount it again: what is left of \(task) there is removed then")
                }
                try WorkDirectory(pool: pool.path, task: task).remove(keepsResult: keepsResult)
            } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }
}
