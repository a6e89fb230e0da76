import FlotillaProtocol
import Messaging
import MigrationModel
import SwiftProtobuf

/// What a deploy that did not come to its end may have left on its host: a domain, reservations, vGPUs. A worker that ends
/// an attempt takes that back itself. One that was lost, or that was to be tried again, can't: the host is asked for an
/// undeploy then, and the migration is over only after that.
extension Transitions {
    private static let permitted = "permit:define-domain"
    private static let done = "done"

    /// The worker did not take it back: it was to be tried again, nobody knows how far it came, or an earlier attempt came
    /// further than the one that ended.
    ///
    /// - Parameter spoken: what the worker said of the end; nil when it said nothing.
    func mayBeLeft(_ task: TaskRecord, _ spoken: TaskEnded?) throws -> Bool {
        guard task.stage == .deploy, let spoken else { return true }
        if MigrationError.Code(rawValue: Int(spoken.code))?.isRetryable ?? false { return true }
        return try hasSinceTakingBack(Self.permitted, task.migrationID, before: task.machine.fence)
    }

    /// What is in use from now on is nobody's to take back but a person's.
    func noteDone(_ deploy: TaskRecord) throws {
        let call = CallIdentity(task: deploy.id, attempt: deploy.machine.attempt, fence: deploy.machine.fence)
        _ = try store.note(TaskEvent(call, sequence: 0, .ended(TaskEnded())), kind: Self.done, at: now)
    }

    /// Whether a deploy of it came to its end, and was not taken back since.
    func wasDone(_ migration: String) throws -> Bool { try hasSinceTakingBack(Self.done, migration) }

    /// Whether a deploy ever changed the host: without a permit it changes nothing.
    func wasDeployed(_ migration: String) throws -> Bool {
        let deploy = Stage.deploy.taskID(ofMigration: migration)
        return try [Self.permitted, Self.done].contains { try store.wasNoted($0, of: deploy, after: 0, before: .max) }
    }

    private func hasSinceTakingBack(_ kind: String, _ migration: String, before fence: UInt64 = .max) throws -> Bool {
        let undeploy = try store.task(id: Stage.undeploy.taskID(ofMigration: migration))?.machine
        let taken = undeploy?.state == .succeeded ? undeploy?.fence ?? 0 : 0
        return try store.wasNoted(kind, of: Stage.deploy.taskID(ofMigration: migration), after: taken, before: fence)
    }

    /// Asks for it, unless a deploy can't have left anything. Returns false then.
    ///
    /// - Parameter error: what the migration ends with, afterwards.
    mutating func takeBack(_ migration: inout MigrationRecord, because error: TaskEnded) throws -> Bool {
        guard migration.result == nil, try hasSinceTakingBack(Self.permitted, migration.id) else { return false }
        // What was done once is in use, whatever a host tells of its domains now.
        if try wasDone(migration.id) {
            migration.findings.append(
                .with {
                    $0.severity = .warning
                    $0.subject = Stage.deploy.rawValue
                    $0.message = "what it did on \(migration.request.host) is not taken back: it was done once before"
                    $0.remedy = "look at the domain there; to take it back: flotilla migration rollback \(migration.id)"
                })
            return false
        }
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
        let options = try settledOptions(of: migration, for: migration.manifest?.vm ?? VirtualMachine())
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
