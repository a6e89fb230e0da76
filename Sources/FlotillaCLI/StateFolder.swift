import Glibc
import HostKit
import MigrationModel

/// Where records of work are kept: the folder the person named, or the usual one.
func stateFolder(_ named: String?) throws -> String {
    if let named { return try absolute(named) }
    if geteuid() == 0 { return "/var/lib/flotilla" }
    if let folder = getenv("XDG_STATE_HOME") { return "\(String(cString: folder))/flotilla" }
    guard let home = getenv("HOME").map({ String(cString: $0) }) else {
        throw MigrationError(.failedPrecondition, "HOME is not set", hint: "name a folder with --state")
    }
    return "\(home)/.local/state/flotilla"
}

/// Makes the folder if it isn't there and holds it for this process as long as the result lives.
///
/// - Parameter role: a file of this name holds the lock; one process of each role may use the folder.
func lockStateFolder(_ folder: String, role: String, hint: String) throws -> File {
    try Files.createDirectories(folder, mode: 0o700)
    let lock = try File("\(folder)/\(role)", O_RDWR | O_CREAT)
    guard flock(lock.descriptor, LOCK_EX | LOCK_NB) == 0 else {
        throw MigrationError(
            .unavailable, "another flotilla process uses the state folder \(folder)", hint: hint)
    }
    return lock
}

/// Against the current directory; nothing of it need exist.
func absolute(_ path: String) throws -> String {
    if path.hasPrefix("/") { return path }
    return path == "." ? try Files.canonical(".") : "\(try Files.canonical("."))/\(path)"
}
