package import FlotillaProtocol
package import MigrationModel

/// The coordinator's database: the queue of record. SQLite here; the protocol is what another database would serve.
package protocol JobStore: Sendable {
    /// Runs `body` in one serializable transaction that is durable when this returns.
    func write<Value: Sendable>(
        _ body: @escaping @Sendable (any JobTransaction) throws -> Value
    ) async throws -> Value
}

package protocol JobTransaction {
    func migration(id: String) throws -> MigrationRecord?
    func migration(key: String) throws -> MigrationRecord?
    func migrationState(id: String) throws -> MigrationState?
    /// Newest first; nil: all.
    func migrations(limit: Int?) throws -> [MigrationRecord]
    /// Oldest first.
    func migrations(in states: [MigrationState]) throws -> [MigrationRecord]
    func save(_ migration: MigrationRecord) throws

    func task(id: String) throws -> TaskRecord?
    /// In stage order.
    func tasks(ofMigration id: String) throws -> [TaskRecord]
    /// Ids of tasks whose wait is over or whose lease has run out. Of drained hosts only those that run, or take
    /// something back; of `hosts` only those that run. Also those that would wait beyond `horizon`, farther than any task
    /// waits: the clock was set back.
    func dueTasks(now: Moment, or horizon: Moment, except hosts: Set<String>) throws -> [String]
    /// Tasks that wait in the queue of a host since before `moment`, for all the store knows, or since after `horizon`.
    func tasksSent(to host: String, before moment: Moment, or horizon: Moment) throws -> [TaskRecord]
    /// Ids of open tasks whose deadline has passed: by more than `grace`, of those that run.
    func expiredTasks(now: Moment, grace: Duration) throws -> [String]
    /// Cancelled tasks of a host that has not said yet that nothing is left of them.
    func unsweptTasks(of host: String) throws -> [TaskRecord]
    /// Tasks that were sent or run.
    func tasksWithWorkers() throws -> [TaskRecord]
    func save(_ task: TaskRecord) throws

    func enqueue(_ message: OutboxRecord) throws
    /// In the order they were enqueued.
    func unsent(limit: Int, except hosts: Set<String>) throws -> [OutboxRecord]
    func markSent(_ id: String, at: Moment) throws
    /// Drops messages of fences older than the task's present one.
    func discardUnsent(task: String) throws

    /// Queues what other programs are to be told.
    func enqueue(_ notification: NotificationRecord) throws
    /// In the order they were queued.
    func notifications(limit: Int) throws -> [NotificationRecord]
    func removeNotification(_ id: String) throws

    /// Notes an event for the record. False when it was noted before.
    func note(_ event: TaskEvent, kind: String, at: Moment) throws -> Bool

    /// Whether an event of the task was noted under a fence between the two.
    func wasNoted(_ kind: String, of task: String, after: UInt64, before: UInt64) throws -> Bool

    /// Remembers what a message on the bus asked for; the last ten thousand are.
    func note(request mark: String, _ migrations: [String]) throws
    /// nil for a message that is not remembered.
    func migrations(ofRequest mark: String) throws -> [String]?

    /// Why a message went to the dead letters, and by whose decision.
    func note(_ rejected: MessageRejected, by member: String, at: Moment) throws
    /// Newest first.
    func rejections(limit: Int) throws -> [RejectionRecord]

    func host(_ name: String) throws -> HostRecord?
    func hosts() throws -> [HostRecord]
    /// Without their profiles, which are large.
    func hostNames() throws -> [String]
    /// Keeps whether the host is drained.
    func save(_ profile: HostProfile, at: Moment) throws
    /// Notes that the host was heard of.
    func touch(host: String, at: Moment) throws
    /// False for a host that is unknown.
    func isDrained(host: String) throws -> Bool
    func setDrained(_ isDrained: Bool, host: String) throws
}
