import FlotillaProtocol
import MigrationModel
import SwiftProtobuf

/// What a deploy that did not come to its end may have left on its host: a domain, reservations, vGPUs. A worker that ends
/// an attempt takes that back itself. One that was lost, or that was to be tried again, can't: the host is asked for an
/// undeploy then, and the migration is over only after that.
extension Transitions {
    /// The worker did not take it back: it was to be tried again, or nobody knows how far it came.
    ///
    /// - Parameter spoken: what the worker said of the end; nil when it said nothing.
    func mayBeLeft(_ task: TaskRecord, _ spoken: TaskEnded?) -> Bool {
        guard task.stage == .deploy, let spoken else { return true }
        return MigrationError.Code(rawValue: Int(spoken.code))?.isRetryable ?? false
    }

    /// Whether a deploy was permitted to change the host since one was last taken back: without a permit it changes nothing.
    private func deployIsLeft(_ migration: String) throws -> Bool {
        let undeploy = try store.task(id: Stage.undeploy.taskID(ofMigration: migration))?.machine
        let taken = undeploy?.state == .succeeded ? undeploy?.fence ?? 0 : 0
        return try store.wasPermitted(Stage.deploy.taskID(ofMigration: migration), "define-domain", after: taken)
    }

    /// Asks for it, unless a deploy can't have left anything. Returns false then.
    ///
    /// - Parameter error: what the migration ends with, afterwards.
    mutating func takeBack(_ migration: inout MigrationRecord, because error: TaskEnded) throws -> Bool {
        // What was done once is in use.
        guard migration.result == nil, try deployIsLeft(migration.id) else { return false }
        migration.state = .rollingBack
        migration.error = error
        try save(migration)
        try start(.undeploy, of: migration, undeploy(migration, force: true))
        return true
    }

    /// - Parameter failure: nil: nothing is left.
    mutating func finishTakingBack(_ migration: inout MigrationRecord, failure: TaskEnded?) throws {
        guard let error = migration.error else {
            migration.error = failure
            migration.state = failure.map(\.finalState) ?? .rolledBack
            return try save(migration)
        }
        migration.state = migration.isBlocked ? .preflightBlocked : error.finalState
        if migration.isBlocked { migration.error = nil }
        if let failure {
            migration.findings.append(
                .with {
                    $0.severity = .warning
                    $0.subject = Stage.undeploy.rawValue
                    $0.message =
                        "what the deploy left on \(migration.request.host) was not taken back"
                        + (failure.message.isEmpty ? "" : ": \(failure.message)")
                    $0.remedy = "flotilla migration rollback \(migration.id)"
                })
        }
        try save(migration)
    }

    /// Of the domain that the deploy was asked for: the source may have another name since.
    func undeploy(_ migration: MigrationRecord, force: Bool) throws -> UndeployRequest {
        let deploy = try store.task(id: Stage.deploy.taskID(ofMigration: migration.id)).map {
            try DeployRequest(serializedBytes: $0.request)
        }
        let options = migration.request.options.settled(for: migration.manifest?.vm ?? VirtualMachine())
        return .with {
            $0.migrationID = migration.id
            $0.domainName = deploy?.options.domainName ?? options.domainName
            $0.force = force
        }
    }
}

extension TaskEnded {
    var finalState: MigrationState { code == MigrationError.Code.cancelled.rawValue ? .cancelled : .failed }
}
