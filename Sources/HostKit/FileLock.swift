import Glibc
import MigrationModel

/// An exclusive lock between processes, and between threads of one: flock(2) on a file of its own, which stays when the
/// lock is gone. Held until the last reference goes, or the process dies.
package final class FileLock: Sendable {
    private let file: File

    /// Blocks until the lock is free. The folder must exist.
    package init(_ path: String) throws {
        file = try File(path, O_RDWR | O_CREAT)
        while flock(file.descriptor, LOCK_EX) != 0 {
            guard errno == EINTR else { throw systemError("lock", path) }
        }
    }

    /// Locks a file or folder that is there; nil when somebody else has the lock.
    package init?(ifFree path: String) throws {
        file = try File(path, O_RDONLY)
        while flock(file.descriptor, LOCK_EX | LOCK_NB) != 0 {
            if errno == EWOULDBLOCK { return nil }
            guard errno == EINTR else { throw systemError("lock", path) }
        }
    }

    /// Runs `body` while holding the lock.
    package static func holding<Value>(_ path: String, _ body: () throws -> Value) throws -> Value {
        let lock = try FileLock(path)
        return try withExtendedLifetime(lock, body)
    }
}
