import FlotillaProtocol
import MigrationModel
import Synchronization

/// Attempts whose workers say that they have made no progress for long. Not stored: the next heartbeat says it again.
final class Silences: Sendable {
    private let known = Mutex<[String: (host: String, attempt: UInt32, seconds: UInt32)]>([:])

    /// - Parameter seconds: 0 for one that goes on, or has ended.
    func note(_ call: CallIdentity, on host: String, seconds: UInt32) {
        known.withLock { known in
            if seconds > 0 {
                known[call.task] = (host, call.attempt, seconds)
            } else if let silent = known[call.task], silent.host == host, silent.attempt <= call.attempt {
                known[call.task] = nil
            }
        }
    }

    /// The migration, with what is known of its attempts that run.
    func told(_ migration: Migration) -> Migration {
        var migration = migration
        known.withLock { known in
            for (index, stage) in migration.stages.enumerated() where stage.state == "running" {
                guard let silent = known[stage.taskID], silent.host == stage.host, silent.attempt == stage.attempt
                else {
                    continue
                }
                migration.stages[index].secondsWithoutProgress = silent.seconds
            }
        }
        return migration
    }
}
