import FoundationEssentials
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// A process that holds reservations, named so that others can tell whether it still lives: as long as it does it has a
/// lock on a file of its own, whatever its process id means to them.
struct Keeper: Sendable {
    /// Of the ledger.
    let folder: String

    private static let held = Mutex<[String: (name: String, file: File)]>([:])

    private var marks: String { "\(folder)/keepers" }

    /// This process's name; its file is made by the first call. Call it under the ledger's lock, as `sweep`.
    func own() throws -> String {
        try Self.held.withLock { held in
            if let known = held[folder], Files.exists(known.file.path) { return known.name }
            try Files.createDirectories(marks, mode: 0o700)
            let name = UUID().uuidString.lowercased()
            let file = try File("\(marks)/\(name)", O_RDWR | O_CREAT | O_EXCL)
            guard flock(file.descriptor, LOCK_EX | LOCK_NB) == 0 else { throw systemError("lock", file.path) }
            held[folder] = (name, file)
            return name
        }
    }

    /// Another process than this one that lives.
    func isOther(_ name: String) -> Bool {
        if Self.held.withLock({ $0[folder]?.name == name }) { return false }
        return isLocked(name)
    }

    private func isLocked(_ name: String) -> Bool {
        guard !name.isEmpty, !name.contains("/"), let file = try? File("\(marks)/\(name)", O_RDWR) else { return false }
        return flock(file.descriptor, LOCK_SH | LOCK_NB) != 0
    }

    /// Removes the files of those that are gone.
    func sweep() {
        for name in (try? Files.list(marks)) ?? [] where !isLocked(name) { try? Files.remove("\(marks)/\(name)") }
    }
}
