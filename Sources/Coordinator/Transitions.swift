import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import MigrationModel
import Messaging
import Passthrough
import SwiftProtobuf

/// One transaction's decisions. Applies events to tasks, moves their migrations on, and collects what must be said
/// to workers and watchers once the transaction is durable.
struct Transitions {
    struct Effects: Sendable {
        var sendsTasks = false
        /// To the named host.
        var control: [(host: String, message: ControlMessage)] = []
        var changed: [Migration] = []
        /// Migrations that somebody asked for.
        var submitted: Set<String> = []
    }

    let store: any JobTransaction
    let now: Moment
    let policy: TaskMachine.Policy
    /// Migrations whose tasks may be sent; nil: all.
    let active: Set<String>?
    private(set) var effects = Effects()

    init(store: any JobTransaction, now: Moment, policy: TaskMachine.Policy, active: Set<String>? = nil) {
        self.store = store
        self.now = now
        self.policy = policy
        self.active = active
    }

    mutating func activate(_ migration: String) { effects.submitted.insert(migration) }

    private func isActive(_ migration: String) -> Bool {
        active?.contains(migration) ?? true || effects.submitted.contains(migration)
    }

    // MARK: - Workers' events

    mutating func handle(_ event: TaskEvent, from host: String) throws {
        guard let task = try store.task(id: event.taskID) else {
            // Not a task of this store: nothing here waits for it, and the worker need not keep it.
            if case .ended = event.kind { tell(host, event.identity, .stored(ResultStored())) }
            return
        }
        guard task.host == host else { return }
        switch event.kind {
        case .accepted:
            _ = try store.note(event, kind: "accepted", at: now)
            _ = try apply(.accepted(fence: event.fence), to: task, answering: event.seq)
        case .heartbeat:
            _ = try apply(.heartbeat(fence: event.fence), to: task, answering: event.seq)
        case .permit(let permit):
            try answer(permit, event, task)
        case .ended(let ended):
            _ = try store.note(event, kind: "ended", at: now)
            let outcome: TaskMachine.Outcome = ended.code == 0 ? .success : .failure(code: Int(ended.code))
            let after = try apply(.ended(fence: event.fence, outcome: outcome), to: task, ended: ended)
            // An older fence's result of a task that is still open is kept by its worker: it answers the next attempt.
            if after.machine != task.machine || after.machine.isEnded {
                tell(host, event.identity, .stored(ResultStored()))
            }
        case .update, nil: break
        }
    }

    /// A permit belongs to the fence: its holder may ask again, an older fence is refused.
    private mutating func answer(_ permit: PermitRequest, _ event: TaskEvent, _ task: TaskRecord) throws {
        let holdsLease = if case .running = task.machine.state { task.machine.fence == event.fence } else { false }
        if holdsLease { _ = try store.note(event, kind: "permit:\(permit.step)", at: now) }
        let reply = PermitReply.with {
            $0.step = permit.step
            $0.granted = holdsLease
            $0.reason = holdsLease ? "" : "the task is owned by fence \(task.machine.fence)"
        }
        tell(task.host, event.identity, .permit(reply))
    }

    /// Runs the task's machine, stores the task, and does what the machine asks for.
    mutating func apply(
        _ event: TaskMachine.Event, to record: TaskRecord, answering sequence: UInt64 = 0, ended: TaskEnded? = nil
    ) throws -> TaskRecord {
        if case .dispatch = event, !isActive(record.migrationID) { return record }
        var task = record
        let actions = task.machine.handle(event, now: now, policy: policy)
        guard task.machine != record.machine || !actions.isEmpty else { return task }
        if case .running = task.machine.state, task.startedAt == nil { task.startedAt = now }
        if task.machine.isEnded { task.endedAt = now }
        try store.save(task)
        for action in actions {
            switch action {
            case .send(let attempt, let fence):
                try store.discardUnsent(task: task.id)
                try store.enqueue(
                    OutboxRecord(
                        id: "\(task.id)-\(fence)",
                        identity: CallIdentity(task: task.id, attempt: attempt, fence: fence),
                        method: task.stage.method, host: task.host, deadline: nil, body: task.request))
                effects.sendsTasks = true
            case .renewLease(let fence):
                tell(
                    task.host, CallIdentity(task: task.id, attempt: task.machine.attempt, fence: fence),
                    .lease(
                        .with {
                            $0.answersSeq = sequence
                            $0.ttlMs = UInt32(clamping: policy.leaseDuration.milliseconds)
                        }))
            case .revoke(let fence): cancel(task, fence, "fence \(task.machine.fence) owns the task", revoked: true)
            case .cancel(let fence): cancel(task, fence, "the migration was cancelled", revoked: false)
            case .finish(let outcome): try finish(task, outcome, ended ?? TaskEnded())
            }
        }
        if try store.migration(id: task.migrationID).map({ !$0.state.isFinal }) ?? false {
            try announce(task.migrationID)
        }
        return task
    }

    private mutating func cancel(_ task: TaskRecord, _ fence: UInt64, _ reason: String, revoked: Bool) {
        tell(
            task.host, CallIdentity(task: task.id, attempt: task.machine.attempt, fence: fence),
            .cancel(
                .with {
                    $0.reason = reason
                    $0.revoked = revoked
                }))
    }

    private mutating func tell(_ host: String, _ call: CallIdentity, _ kind: ControlMessage.OneOf_Kind) {
        effects.control.append(
            (
                host,
                .with {
                    $0.taskID = call.task
                    $0.fence = call.fence
                    $0.kind = kind
                }
            ))
    }

    // MARK: - The migration's way

    private mutating func finish(_ task: TaskRecord, _ outcome: TaskMachine.Outcome, _ ended: TaskEnded) throws {
        guard var migration = try store.migration(id: task.migrationID), !migration.state.isFinal else { return }
        switch outcome {
        case .failure(let code):
            migration.state = code == MigrationError.Code.cancelled.rawValue ? .cancelled : .failed
            migration.error = ended
            try save(migration)
        case .success:
            do {
                try advance(&migration, after: task.stage, ended)
            } catch let error as MigrationError {
                migration.state = .failed
                migration.error = TaskEnded(error)
                try save(migration)
            }
        }
    }

    private mutating func advance(_ migration: inout MigrationRecord, after stage: Stage, _ ended: TaskEnded) throws {
        switch stage {
        case .export:
            let last = try ExportUpdate(serializedBytes: ended.result)
            guard case .result(let result) = last.update else { throw resultMissing(stage) }
            try afterExport(&migration, result.manifest)
        case .convert:
            let last = try ConvertUpdate(serializedBytes: ended.result)
            guard case .result(let result) = last.update, result.disks.count == migration.manifest?.disks.count else {
                throw resultMissing(stage)
            }
            migration.manifest?.disks = result.disks
            try startDeploy(&migration, .deploy)
        case .deploy:
            let last = try DeployUpdate(serializedBytes: ended.result)
            guard case .result(let result) = last.update else { throw resultMissing(stage) }
            // A check tells how the domain is now; how it was proved stays.
            if result.proof.isEmpty, migration.hasResult(of: result) {
                migration.result?.domainState = result.domainState
            } else {
                migration.result = result
            }
            migration.findings += result.findings
            migration.state = migration.request.dryRun ? .ready : .done
            try save(migration)
        }
    }

    private func resultMissing(_ stage: Stage) -> MigrationError {
        MigrationError(.internal, "the \(stage.rawValue) task ended well but without a result")
    }

    private mutating func afterExport(_ migration: inout MigrationRecord, _ captured: Manifest) throws {
        let request = migration.request
        let options = request.options.settled(for: captured.vm)
        guard let host = try store.host(request.host) else {
            throw MigrationError(
                .unavailable, "host \(request.host) has not told of itself yet", hint: "is its worker running?")
        }
        let earlier = migration.manifest
        let wasConverted =
            try store.task(id: Stage.convert.taskID(ofMigration: migration.id))?.machine.state == .succeeded
        let isDeployed = migration.result != nil && host.domains.contains { $0.migrationID == migration.id }
        var manifest = captured
        manifest.migrationID = migration.id
        if wasConverted, let earlier { manifest.keepTargets(of: earlier) }
        migration.findings.removeAll { $0.subject != MigrationRecord.requestSubject }
        let findings = preflight(
            manifest: manifest, options: options, pool: request.pool, diskFormat: request.format, host: host)

        if wasConverted, isDeployed, let earlier {
            // A domain is in use that was made from the source as it was: a changed one must not pass for done.
            guard earlier.source.fingerprint == captured.source.fingerprint else {
                throw MigrationError(
                    .failedPrecondition, "\(request.sourceURL) changed since \(earlier.vm.name) was migrated from it",
                    hint: "undefine domain \(options.domainName) and remove its disks, then run the same command again "
                        + "to migrate it anew")
            }
            migration.findings += findings.filter { $0.severity != .blocked }
            return try startDeploy(&migration, .check)
        }
        migration.manifest = manifest
        migration.findings += findings
        guard !findings.contains(where: { $0.severity == .blocked }) else {
            migration.state = .preflightBlocked
            return try save(migration)
        }
        if request.dryRun {
            migration.manifest?.planTargets(request, options, on: host)
            return try startDeploy(&migration, .dryRun)
        }
        migration.state = .converting
        try save(migration)
        try start(
            .convert, of: migration,
            ConvertRequest.with {
                $0.manifest = manifest
                $0.convertedFingerprint = earlier?.source.fingerprint ?? ""
                $0.pool = request.pool
                $0.format = request.format
                $0.domainName = options.domainName
            })
    }

    private mutating func startDeploy(_ migration: inout MigrationRecord, _ mode: DeployMode) throws {
        migration.state = .deploying
        try save(migration)
        let (manifest, request) = (migration.manifest ?? Manifest(), migration.request)
        try start(
            .deploy, of: migration,
            DeployRequest.with {
                $0.manifest = manifest
                $0.options = request.options.settled(for: manifest.vm)
                $0.mode = mode
            })
    }

    /// Makes the stage's task, or runs it again with a new request and larger fence.
    mutating func start(
        _ stage: Stage, of migration: MigrationRecord, _ request: some SwiftProtobuf.Message
    ) throws {
        let body: [UInt8] = try request.serializedBytes()
        var task: TaskRecord
        if let earlier = try store.task(id: stage.taskID(ofMigration: migration.id)) {
            task = earlier
            task.request = body
            task.host = migration.request.host
            (task.startedAt, task.endedAt) = (nil, nil)
            task = try apply(.restart, to: task)
        } else {
            task = TaskRecord(
                migrationID: migration.id, stage: stage, host: migration.request.host, request: body, now: now)
        }
        _ = try apply(.dispatch, to: task)
    }

    mutating func save(_ record: MigrationRecord) throws {
        var record = record
        record.updatedAt = now
        try store.save(record)
        try announce(record.id)
    }

    private mutating func announce(_ id: String) throws {
        guard let record = try store.migration(id: id) else { return }
        let migration = Migration(record, tasks: try store.tasks(ofMigration: id))
        if let last = effects.changed.lastIndex(where: { $0.id == id }) { effects.changed.remove(at: last) }
        effects.changed.append(migration)
    }
}

extension MigrationRecord {
    static let requestSubject = "request"

    /// Says something about the request itself.
    mutating func notice(_ message: String, remedy: String) {
        findings.append(
            .with {
                $0.severity = .note
                $0.subject = Self.requestSubject
                $0.message = message
                $0.remedy = remedy
            })
    }

    fileprivate func hasResult(of other: DeployResult) -> Bool {
        result?.domainUuid == other.domainUuid && !(result?.proof.isEmpty ?? true)
    }
}

extension DeployOptions {
    /// With what depends on the VM decided: its domain's name, and no source UUID where there is none.
    fileprivate func settled(for vm: VirtualMachine) -> DeployOptions {
        var options = self
        options.domainName = domainName(for: vm)
        options.keepUuid = keepUuid && !vm.biosUuid.isEmpty
        return options
    }
}

extension Manifest {
    /// What an earlier conversion of the same disks made.
    fileprivate mutating func keepTargets(of earlier: Manifest) {
        guard disks.map(\.id) == earlier.disks.map(\.id) else { return }
        for (index, disk) in earlier.disks.enumerated() where disk.hasTarget {
            disks[index].target = disk.target
            disks[index].source.sha256 = disk.source.sha256
            disks[index].source.contentSha256 = disk.source.contentSha256
            disks[index].source.contentChunkBytes = disk.source.contentChunkBytes
            disks[index].source.streamBytes = disk.source.streamBytes
        }
    }

    /// Names the images that a conversion would make, for a dry run.
    fileprivate mutating func planTargets(
        _ request: SubmitMigrationRequest, _ options: DeployOptions, on host: HostProfile
    ) {
        let folder = host.pools.first { $0.name == request.pool }?.path ?? request.pool
        for index in disks.indices {
            disks[index].target.format = request.format
            disks[index].target.path = targetPath(
                pool: folder, domain: options.domainName, disk: disks[index].id, format: request.format)
        }
    }
}

extension Stage {
    var method: String {
        switch self {
        case .export: ExportService.Method.Export.descriptor.fullyQualifiedMethod
        case .convert: ConvertService.Method.Convert.descriptor.fullyQualifiedMethod
        case .deploy: DeployService.Method.Deploy.descriptor.fullyQualifiedMethod
        }
    }
}

extension MigrationState {
    package var isFinal: Bool {
        switch self {
        case .done, .failed, .preflightBlocked, .cancelled, .ready: true
        case .exporting, .converting, .deploying, .unspecified, .UNRECOGNIZED: false
        }
    }
}

extension TaskEnded {
    init(_ error: MigrationError) {
        self.init()
        code = Int32(error.code.rawValue)
        message = error.message
        hint = error.hint ?? ""
    }
}

extension Migration {
    init(_ record: MigrationRecord, tasks: [TaskRecord]) {
        self.init()
        id = record.id
        request = record.request
        state = record.state
        if let manifest = record.manifest { self.manifest = manifest }
        if let result = record.result { self.result = result }
        findings = record.findings
        if let error = record.error {
            errorCode = error.code
            errorMessage = error.message
            errorHint = error.hint
        }
        createdAt = record.createdAt.timestamp
        updatedAt = record.updatedAt.timestamp
        stages = tasks.map { task in
            .with {
                $0.name = task.stage.rawValue
                $0.taskID = task.id
                $0.host = task.host
                $0.attempt = task.machine.attempt
                $0.state =
                    switch task.machine.state {
                    case .waiting: "waiting"
                    case .sent: "sent"
                    case .running: "running"
                    case .succeeded: "succeeded"
                    case .failed: "failed"
                    case .cancelled: "cancelled"
                    }
                if let started = task.startedAt { $0.startedAt = started.timestamp }
                if let ended = task.endedAt { $0.endedAt = ended.timestamp }
            }
        }
    }
}
