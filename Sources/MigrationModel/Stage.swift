/// The three tasks of a migration, in order.
package enum Stage: String, CaseIterable, Sendable, Codable {
    case export, convert, deploy

    /// Identifies a migration's task of this stage; the same over all its attempts. Safe as a file name.
    package func taskID(ofMigration id: String) -> String { "\(id)-\(rawValue)" }
}
