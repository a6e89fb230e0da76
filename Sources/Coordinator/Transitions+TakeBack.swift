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
    func mayBeLeft(_ task: TaskRecord, _ spoken: TaskEnded?) throws -> Bool {
        guard task.stage == .deploy else { return try replacedDeployIsLeft(task.migrationID) }
        guard let spoken else { return true }
        return MigrationError.Code(rawValue: Int(spoken.code))?.isRetryable ?? false
    }

    /// Whether a deploy was cancelled, to make way for a run that has not come as far, and was not taken back.
    func replacedDeployIsLeft(_ migration: String) throws -> Bool {
        guard let deploy = try store.task(id: Stage.deploy.taskID(ofMigration: migration)),
            deploy.machine.state == .cancelled
        else { return false }
        let undeploy = try store.task(id: Stage.undeploy.taskID(ofMigration: migration))
        return undeploy.map { $0.machine.fence < deploy.machine.fence || $0.machine.state != .succeeded } ?? true
    }

    /// Asks for it, unless the deploy can't have left anything. Returns false then.
    ///
    /// - Parameter error: what the migration ends with, afterwards.
    mutating func takeBack(_ migration: inout MigrationRecord, because error: TaskEnded) throws -> Bool {
        guard let deploy = try store.task(id: Stage.deploy.taskID(ofMigration: migration.id)), deploy.startedAt != nil,
            // A check changes nothing, and what was done once is in use.
            try DeployRequest(serializedBytes: deploy.request).mode == .deploy, migration.result == nil
        else { return false }
        migration.state = .rollingBack
        migration.error = error
        try save(migration)
        try start(.undeploy, of: migration, migration.undeploy(force: true))
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
}

extension TaskEnded {
    var finalState: MigrationState { code == MigrationError.Code.cancelled.rawValue ? .cancelled : .failed }
}

extension MigrationRecord {
    func undeploy(force: Bool) -> UndeployRequest {
        .with {
            $0.migrationID = id
            $0.domainName = request.options.settled(for: manifest?.vm ?? VirtualMachine()).domainName
            $0.force = force
        }
    }
}
