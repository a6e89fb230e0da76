import Glibc
import HostKit
import MigrationModel

/// A region of a file that holds one file of the source: all of it, or an OVA's member in place.
struct Region: Sendable {
    let path: String
    let offset: UInt64
    let length: UInt64
    /// `path` without its links, where it was checked that those lead nowhere else.
    var resolved: String?

    /// Opens the file that was checked.
    func open() throws -> File { try resolved.map { try File(resolved: $0) } ?? File(path, O_RDONLY) }

    /// All bytes of a small text file.
    func read(limit: Int, name: String) throws -> [UInt8] {
        guard length <= UInt64(limit) else {
            throw MigrationError(.invalidArgument, "\(name): larger than the \(limit) bytes such a file may have")
        }
        return try open().readExactly(at: offset, count: Int(length))
    }
}

/// The folder of an OVF or VMX file. Names found in descriptors are resolved inside it and nowhere else, whatever
/// links lie there.
struct SourceFolder: Sendable {
    /// Absolute.
    let path: String

    func exists(_ name: String) -> Bool { Files.exists("\(path)/\(name)") }

    /// A regular file below this folder.
    ///
    /// - Parameters:
    ///   - owner: who names the file, for messages: "web.vmx: scsi0:0.fileName".
    ///   - remedy: the next step when the name leads elsewhere.
    func file(_ name: String, owner: String, remedy: String) throws -> Region {
        try Self.checkName(name, owner: owner, remedy: remedy)
        let full = "\(path)/\(name)"
        guard Files.exists(full) else {
            throw MigrationError(
                .notFound, "\(owner): file \(name.printable) is not in \(path)",
                hint: "copy the missing file there, or export the VM again")
        }
        let root = try Files.canonical(path)
        let real = try Files.canonical(full)
        guard real.hasPrefix(root == "/" ? "/" : root + "/") else {
            throw MigrationError(
                .permissionDenied, "\(owner): \(name.printable) is a link that leaves \(path)", hint: remedy)
        }
        // Not blocking: a FIFO of that name would hold the open until someone writes to it.
        let info = try File(resolved: real, O_RDONLY | O_NONBLOCK).status()
        guard info.st_mode & S_IFMT == S_IFREG else {
            throw MigrationError(.invalidArgument, "\(owner): \(name.printable) is not a regular file")
        }
        return Region(path: full, offset: 0, length: UInt64(info.st_size), resolved: real)
    }

    /// Refuses names that can't be plain relative ones.
    static func checkName(_ name: String, owner: String, remedy: String) throws {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(.invalidArgument, "\(owner): file name '\(name.printable)' \(why)", hint: remedy)
        }
        if name.isEmpty { throw refuse("is empty") }
        if name.utf8.contains(0) { throw refuse("contains a NUL byte") }
        if name.hasPrefix("/") { throw refuse("is an absolute path, outside the source's folder") }
        if name.contains("\\") { throw refuse("contains a backslash: it is a Windows path or a hostile one") }
        if name.utf8.count > 1024 { throw refuse("is longer than 1,024 bytes") }
        let parts = name.split(separator: "/", omittingEmptySubsequences: false)
        if parts.contains("..") { throw refuse("leads out of the source's folder") }
    }
}
