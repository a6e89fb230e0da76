import FlotillaProtocol
import Messaging
import MigrationModel
import SwiftProtobuf

/// One transaction's decisions. Applies events to tasks, moves their migrations on, and collects what must be said
/// to workers and watchers once the transaction is durable.
struct Transitions {
    struct Effects: Sendable {
        var sendsTasks = false
        var notifies = false
        /// By host, in order.
        var control: [String: [ControlMessage]] = [:]
        var changed: [Migration] = []
        /// Attempts of which nothing more will come.
        var lost: [CallIdentity] = []
        /// Migrations that somebody asked for.
        var submitted: Set<String> = []
    }

    let store: any JobTransaction
    let now: Moment
    let policy: TaskMachine.Policy
    /// Migrations whose tasks may be sent; nil: all.
    let active: Set<String>?
    /// Whether the coordinator has a key of a host. One without gets no tasks: what its worker says isn't heard.
    let knows: (String) -> Bool
    /// Whether other programs are told of changes.
    let notifies: Bool
    /// Whether somebody watches a migration. Who begins to after this was asked reads the migration after this
    /// transaction.
    let isWatched: (String) -> Bool
    var effects = Effects()
    /// What is cancelled now makes way for another request of the same migration, which goes on with what is there.
    var isReplaced = false
    /// Hosts of which this transaction has asked whether they are drained.
    private var drained: [String: Bool] = [:]

    init(
        store: any JobTransaction, now: Moment, policy: TaskMachine.Policy, active: Set<String>? = nil,
        knows: @escaping (String) -> Bool, notifies: Bool, isWatched: @escaping (String) -> Bool
    ) {
        self.store = store
        self.now = now
        self.policy = policy
        self.active = active
        self.knows = knows
        self.notifies = notifies
        self.isWatched = isWatched
    }

    mutating func activate(_ migration: String) { effects.submitted.insert(migration) }

    func isActive(_ migration: String) -> Bool {
        active?.contains(migration) ?? true || effects.submitted.contains(migration)
    }

    /// Throws `failedPrecondition` for a host without a key, whose tasks would never end.
    func requireKey(of host: String) throws {
        guard knows(host) else { throw MigrationError.forgotten(host) }
    }

    func present(_ record: MigrationRecord) throws -> Migration {
        Migration(record, tasks: try store.tasks(ofMigration: record.id), knows: knows)
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
        case .released(let released):
            _ = try store.note(event, kind: "released", at: now)
            let after = try apply(.released(fence: event.fence, blameless: released.blameless), to: task)
            _ = try apply(.dispatch, to: after)
        case .permit(let permit):
            try answer(permit, event, task)
        case .ended(let ended):
            _ = try store.note(event, kind: "ended", at: now)
            let outcome: TaskMachine.Outcome = ended.code == 0 ? .success : .failure(code: Int(ended.code))
            let after = try apply(.ended(fence: event.fence, outcome: outcome), to: task, ended: ended)
            if task.machine.state == .cancelled, event.fence == task.machine.fence { try keepDisks(of: after, ended) }
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
        if case .dispatch = event {
            // What a drained host has is its own to take back.
            guard isActive(record.migrationID), knows(record.host),
                try record.stage == .undeploy || !isDrained(record.host)
            else { return record }
        }
        var task = record
        let actions = task.machine.handle(event, now: now, policy: policy)
        guard task.machine != record.machine || !actions.isEmpty else { return task }
        if task.machine.losses > record.machine.losses {
            effects.lost.append(
                CallIdentity(task: task.id, attempt: record.machine.attempt, fence: record.machine.fence))
        }
        if case .running = task.machine.state, task.startedAt == nil { task.startedAt = now }
        if task.machine.isEnded, !record.machine.isEnded {
            task.endedAt = now
            // A host whose queue took nothing must not begin it when it's over.
            try store.discardUnsent(task: task.id)
        }
        if task.machine != record.machine { try store.save(task) }
        for action in actions {
            switch action {
            case .send(let attempt, let fence):
                try store.discardUnsent(task: task.id)
                try store.enqueue(
                    OutboxRecord(
                        id: "\(task.id)-\(fence)",
                        identity: CallIdentity(task: task.id, attempt: attempt, fence: fence),
                        method: task.stage.method, host: task.host, deadline: task.deadline,
                        body: task.request))
                effects.sendsTasks = true
            case .renewLease(let fence):
                tell(
                    task.host, CallIdentity(task: task.id, attempt: task.machine.attempt, fence: fence),
                    .lease(
                        .with {
                            $0.answersSeq = sequence
                            $0.ttlMs = UInt32(clamping: policy.leaseDuration.milliseconds)
                        }))
            case .revoke(let fence):
                let isOver = fence == task.machine.fence && task.machine.isEnded
                let reason = isOver ? "the task is over" : "fence \(task.machine.fence) owns the task"
                cancel(task, fence, reason, revoked: true)
            case .cancel(let fence): cancel(task, fence, "the migration was cancelled", revoked: false)
            case .finish(let outcome): try finish(task, outcome, ended)
            }
        }
        if isWatched(task.migrationID), try store.migrationState(id: task.migrationID)?.isFinal == false {
            try announce(task.migrationID)
        }
        return task
    }

    private mutating func isDrained(_ host: String) throws -> Bool {
        if let known = drained[host] { return known }
        let isDrained = try store.isDrained(host: host)
        drained[host] = isDrained
        return isDrained
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

    mutating func tell(_ host: String, _ call: CallIdentity, _ kind: ControlMessage.OneOf_Kind) {
        effects.control[host, default: []].append(
            .with {
                $0.taskID = call.task
                $0.fence = call.fence
                $0.kind = kind
            })
    }
}
