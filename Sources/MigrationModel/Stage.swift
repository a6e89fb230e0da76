/// The tasks of a migration.
package enum Stage: String, Sendable, Codable {
    case export, convert, deploy
    /// Takes the deploy back.
    case undeploy

    /// Those of a migration's way, in order.
    package static let way = [export, convert, deploy]

    /// Identifies a migration's task of this stage; the same over all its attempts. Safe as a file name.
    package func taskID(ofMigration id: String) -> String { "\(id)-\(rawValue)" }

    /// Nil for what is no task's id.
    package static func migrationID(ofTask task: String) -> String? {
        guard let dash = task.lastIndex(of: "-"), dash != task.startIndex,
            Stage(rawValue: String(task[task.index(after: dash)...])) != nil
        else { return nil }
        return String(task[..<dash])
    }
}
