import FlotillaProtocol
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf

extension Transitions {
    /// A new migration, or the one that the same source, VM, host and pool made before. One that runs goes on, unless
    /// something else is asked of it now; then, and when it has ended, it is looked at again from the export, which is
    /// cheap and finds a changed source. What is done stays done: other options don't touch a domain in use.
    mutating func submit(_ request: SubmitMigrationRequest) throws -> Migration {
        try requireKey(of: request.host)
        if request.hasDeadline, request.deadline.moment <= now {
            throw MigrationError(
                .invalidArgument, "the deadline, \(request.deadline.text), has passed", hint: TaskEnded.laterDeadline)
        }
        let parts = [request.sourceURL, request.vmName, request.host, request.pool, request.options.domainName]
        let key = hex(Digest.hash(.sha256, Array(parts.joined(separator: "\0").utf8)))
        var record: MigrationRecord
        if let earlier = try store.migration(key: key) {
            record = earlier
            // One that ends by itself is of a run that failed; this one somebody asked for.
            guard record.state != .rollingBack || record.error != nil else {
                throw MigrationError(
                    .failedPrecondition, "migration \(record.id) is being rolled back",
                    hint: "repeat the rollback's command to see its end, then migrate it again")
            }
            activate(record.id)
            // What is under way keeps its deadline: the worker was told, and would have to begin anew.
            let isOther = record.request.withoutDeadline != request.withoutDeadline
            if isOther && !record.state.isFinal {
                guard !request.dryRun else {
                    throw MigrationError(
                        .failedPrecondition, "migration \(record.id) is \(record.state.word): a dry run would stop it",
                        hint: "wait for its end, or cancel it first")
                }
                isReplaced = true
                defer { isReplaced = false }
                for task in try store.tasks(ofMigration: record.id) where !task.machine.isEnded {
                    _ = try apply(.cancel, to: task)
                }
                record = try store.migration(id: record.id) ?? record
            }
            if record.state.isFinal {
                record.findings = []
                // What a dry run said it would do is not done. Only that has the domain's XML in it.
                if record.result?.domainXml.isEmpty == false { record.result = nil }
                if record.state != .done {
                    record.request = request
                } else {
                    record.request = record.request.withoutDeadline
                    if request.hasDeadline { record.request.deadline = request.deadline }
                }
                if record.state == .done, isOther {
                    record.notice(
                        "it was done before with other options; those of now were not applied",
                        remedy: "undefine the domain and remove its disks and state to migrate it anew")
                }
                record.error = nil
                record.state = .exporting
                try save(record)
                try startExport(record)
            } else {
                for task in try store.tasks(ofMigration: record.id) { _ = try apply(.dispatch, to: task) }
            }
        } else {
            record = MigrationRecord(
                id: makeMigrationID(at: now), key: key, request: request, state: .exporting, createdAt: now,
                updatedAt: now)
            activate(record.id)
            try save(record)
            try startExport(record)
        }
        return try present(record)
    }

    private mutating func startExport(_ record: MigrationRecord) throws {
        try start(
            .export, of: record,
            ExportRequest.with {
                $0.migrationID = record.id
                $0.sourceURL = record.request.sourceURL
                $0.vmName = record.request.vmName
            })
    }

    /// Has the host take a migration's deploy back. One whose rollback is under way goes on.
    mutating func rollBack(_ request: RollbackMigrationRequest) throws -> Migration {
        guard var record = try store.migration(id: request.id) else {
            throw MigrationError(.notFound, "there is no migration \(request.id)")
        }
        guard record.state.isFinal || record.state == .rollingBack else {
            throw MigrationError(
                .failedPrecondition, "migration \(record.id) is still \(record.state.word)",
                hint: "cancel it: that takes back what it made")
        }
        guard record.manifest != nil, try wasDeployed(record.id) else {
            throw MigrationError(
                .failedPrecondition, "migration \(record.id) never defined a domain: there is nothing to take back")
        }
        try requireKey(of: record.request.host)
        if request.dryRun { return try present(record) }
        activate(record.id)
        let undeploy = try undeploy(record, force: request.force)
        if record.state == .rollingBack {
            for var task in try store.tasks(ofMigration: record.id) where task.stage == .undeploy {
                // An attempt that runs goes on as it was asked for.
                task.request = try undeploy.serializedBytes()
                try store.save(task)
                _ = try apply(.dispatch, to: task)
            }
            return try present(record)
        }
        record.findings = []
        record.error = nil
        record.state = .rollingBack
        try save(record)
        try start(.undeploy, of: record, undeploy)
        return try present(record)
    }

    /// Ends what is open of it. A convert that failed keeps its images for another attempt; they go, too.
    mutating func cancel(_ id: String) throws -> Migration {
        guard let record = try store.migration(id: id) else {
            throw MigrationError(.notFound, "there is no migration \(id)")
        }
        for task in try store.tasks(ofMigration: id) where !task.machine.isEnded || task.stage == .convert {
            _ = try apply(.cancel, to: task)
        }
        return try present(try store.migration(id: id) ?? record)
    }
}
