import CLinux
import Glibc
import MigrationModel

/// Whole-file operations that survive a crash at any point.
package enum Files {
    /// Writes to a temporary name in the same directory, fsyncs, renames over `path` and fsyncs the directory:
    /// after a crash `path` holds the old bytes or the new ones, never a mixture.
    package static func writeAtomically(_ bytes: [UInt8], to path: String, mode: UInt32 = 0o600) throws {
        let temporary = "\(path).tmp"
        let file = try File(temporary, O_WRONLY | O_CREAT | O_TRUNC, mode: mode)
        try file.write(bytes, at: 0)
        try file.synchronize()
        guard rename(temporary, path) == 0 else { throw systemError("rename \(temporary) to", path) }
        try synchronizeDirectory(of: path)
    }

    /// Publishes a finished file under its final name. Never replaces: throws `alreadyExists` when `path` is taken.
    package static func publish(_ temporary: String, as path: String) throws {
        if flotilla_rename_noreplace(temporary, path) != 0 {
            // NFS and some FUSE file systems can't; a second link can't replace anything either.
            guard errno == EINVAL || errno == ENOSYS, !isDirectory(temporary) else {
                throw systemError("rename \(temporary) to", path)
            }
            guard link(temporary, path) == 0 else { throw systemError("link \(temporary) as", path) }
            guard unlink(temporary) == 0 else { throw systemError("remove", temporary) }
        }
        try synchronizeDirectory(of: path)
    }

    /// Gives a folder another name in the same one. Replaces an empty folder at most, as rename(2) does; unlike `publish` it
    /// works for folders on NFS and CephFS, too.
    package static func move(folder: String, to path: String) throws {
        guard rename(folder, path) == 0 else { throw systemError("rename \(folder) to", path) }
        try synchronizeDirectory(of: path)
    }

    package static func synchronizeDirectory(of path: String) throws {
        try File(parent(of: path), O_RDONLY | O_DIRECTORY).synchronize()
    }

    package static func parent(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    package static func name(of path: String) -> String {
        path.lastIndex(of: "/").map { String(path[path.index(after: $0)...]) } ?? path
    }

    /// The bytes of a small file. Throws `outOfRange` when it holds more than `limit` bytes.
    package static func read(_ path: String, limit: Int = 16 << 20) throws -> [UInt8] {
        let file = try File(path, O_RDONLY)
        var bytes: [UInt8] = []
        // A pseudo-file's size reads 0, so read until the end rather than by size.
        while true {
            let piece = try [UInt8](unsafeUninitializedCapacity: 64 << 10) { buffer, count in
                count = try file.read(at: UInt64(bytes.count), into: UnsafeMutableRawBufferPointer(buffer))
            }
            if piece.isEmpty { return bytes }
            bytes += piece
            guard bytes.count <= limit else {
                throw MigrationError(.outOfRange, "\(path): larger than the \(limit) bytes such a file may have")
            }
        }
    }

    /// The bytes of a key or password file. Throws `permissionDenied` unless it is a plain file that only its owner,
    /// this process's user or root, can read.
    package static func readSecret(_ path: String) throws -> [UInt8] {
        let file: File
        do { file = try File(path, O_RDONLY | O_NONBLOCK) } catch let error as MigrationError
            where error.code == .permissionDenied
        { throw unreadable(path) }
        let status = try file.status()
        guard status.st_mode & S_IFMT == S_IFREG else {
            throw MigrationError(.permissionDenied, "secret \(path) is not a plain file")
        }
        guard status.st_mode & 0o077 == 0 else {
            throw MigrationError(
                .permissionDenied, "secret \(path) can be read by others, its mode is \(octal(status.st_mode))",
                hint: "chmod 600 \(path)")
        }
        guard status.st_uid == geteuid() || status.st_uid == 0 else {
            let (owner, user) = (userName(status.st_uid), userName(geteuid()))
            throw MigrationError(
                .permissionDenied, "secret \(path) belongs to \(owner), and \(user) runs this",
                hint: "run it as \(owner): sudo -u \(owner) flotilla …; or, if it is \(user)'s: chown \(user) \(path)")
        }
        guard status.st_size <= 64 << 10 else {
            throw MigrationError(.outOfRange, "secret \(path) is larger than 64 KiB")
        }
        return try file.readExactly(at: 0, count: Int(status.st_size))
    }

    /// A file, or a folder on the way to it, that this process's user may not read.
    private static func unreadable(_ path: String) -> MigrationError {
        let user = userName(geteuid())
        var info = stat()
        let owner =
            stat(path, &info) == 0 ? ": it belongs to \(userName(info.st_uid)), mode \(octal(info.st_mode))" : ""
        return MigrationError(
            .permissionDenied, "\(user), who runs this, can't read secret \(path)\(owner)",
            hint: "chown \(user) \(path), and let \(user) search the folders on the way to it")
    }

    private static func octal(_ mode: mode_t) -> String { String(mode & 0o7777, radix: 8) }

    /// Throws `permissionDenied` when somebody else than this process's user and root could change what is in a folder.
    package static func requireProtected(_ folder: String) throws {
        let status = try File(folder, O_RDONLY | O_DIRECTORY).status()
        guard status.st_mode & 0o022 == 0, status.st_uid == geteuid() || status.st_uid == 0 else {
            throw MigrationError(
                .permissionDenied,
                "folder \(folder) can be changed by others: it belongs to \(userName(status.st_uid)), mode "
                    + "\(octal(status.st_mode)), and \(userName(geteuid())) runs this",
                hint: "chown root \(folder); chmod go-w \(folder)")
        }
    }

    package static func exists(_ path: String) -> Bool {
        var info = stat()
        return lstat(path, &info) == 0
    }

    /// Like `exists`, where a name that can't be looked at must not pass for one that is free: throws then.
    package static func isThere(_ path: String) throws -> Bool {
        var info = stat()
        if lstat(path, &info) == 0 { return true }
        guard errno == ENOENT || errno == ENOTDIR else { throw systemError("look at", path) }
        return false
    }

    /// Whether another file system begins at this folder.
    package static func isMountPoint(_ path: String) -> Bool {
        var (inside, above) = (stat(), stat())
        return stat("\(path)/.", &inside) == 0 && stat("\(path)/..", &above) == 0 && inside.st_dev != above.st_dev
    }

    package static func isDirectory(_ path: String) -> Bool {
        var info = stat()
        return stat(path, &info) == 0 && info.st_mode & S_IFMT == S_IFDIR
    }

    /// A plain file, not a link to one.
    package static func isRegular(_ path: String) -> Bool {
        var info = stat()
        return lstat(path, &info) == 0 && info.st_mode & S_IFMT == S_IFREG
    }

    /// Creates `path` and its parents; one that exists is fine.
    package static func createDirectories(_ path: String, mode: UInt32 = 0o755) throws {
        if isDirectory(path) { return }
        let above = parent(of: path)
        if above != path { try createDirectories(above, mode: mode) }
        guard mkdir(path, mode) == 0 || (errno == EEXIST && isDirectory(path)) else {
            throw systemError("create directory", path)
        }
    }

    /// The names in a directory, without `.` and `..`, sorted.
    package static func list(_ path: String) throws -> [String] {
        guard let directory = opendir(path) else { throw systemError("list", path) }
        defer { closedir(directory) }
        var names: [String] = []
        while let entry = readdir(directory) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    /// Removes a file or a whole tree; a missing one is fine. Never follows a symbolic link.
    package static func remove(_ path: String) throws {
        var info = stat()
        guard lstat(path, &info) == 0 else {
            guard errno == ENOENT || errno == ENOTDIR else { throw systemError("remove", path) }
            return
        }
        if info.st_mode & S_IFMT == S_IFDIR {
            for name in try list(path) { try remove("\(path)/\(name)") }
            guard rmdir(path) == 0 || errno == ENOENT else { throw systemError("remove", path) }
        } else {
            guard unlink(path) == 0 || errno == ENOENT else { throw systemError("remove", path) }
        }
    }

    /// Removes a directory unless something is in it, or it is gone already.
    package static func removeDirectoryIfEmpty(_ path: String) throws {
        guard rmdir(path) == 0 || [ENOTEMPTY, EEXIST, ENOENT].contains(errno) else { throw systemError("remove", path) }
    }

    /// Writes and syncs a byte in the directory, in a file that never has a name: a crash leaves nothing behind. Where
    /// the file system has no such files (NFS), in a named one that the next probe takes over.
    package static func probeWriting(_ directory: String) throws {
        let named = "\(directory)/.flotilla-probe"
        let file: File
        do {
            file = try File(directory, O_WRONLY | flotilla_o_tmpfile)
        } catch  where errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL {
            file = try File(named, O_WRONLY | O_CREAT)
        }
        defer { unlink(named) }
        try file.write([0], at: 0)
        try file.synchronizeData()
    }

    /// Bytes an unprivileged writer may still put on the file system that holds `path`.
    package static func freeBytes(_ path: String) throws -> UInt64 {
        var info = statvfs()
        guard statvfs(path, &info) == 0 else { throw systemError("statvfs", path) }
        return UInt64(info.f_bavail) * UInt64(info.f_frsize)
    }

    /// As open(2), but fails with `ELOOP` for a path with a link.
    static func openResolved(_ path: String, _ flags: Int32) -> Int32 {
        let descriptor = flotilla_open_resolved(path, flags)
        // Kernels before 5.6: the last component is what others can change most often.
        return descriptor < 0 && errno == ENOSYS ? open(path, flags | O_NOFOLLOW) : descriptor
    }

    /// The absolute path with every symbolic link resolved.
    package static func canonical(_ path: String) throws -> String {
        guard let resolved = realpath(path, nil) else { throw systemError("resolve", path) }
        defer { free(resolved) }
        return String(cString: resolved)
    }
}
