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

/// Against the current directory; nothing of it need exist.
func absolute(_ path: String) throws -> String {
    if path.hasPrefix("/") { return path }
    return path == "." ? try Files.canonical(".") : "\(try Files.canonical("."))/\(path)"
}
