import FlotillaProtocol
import FoundationEssentials
import GRDB
import MigrationModel
import SwiftProtobuf

/// Rows to records and back. Lives only inside one transaction. Columns are read by their place: by name costs more than
/// SQLite's own work.
struct SQLiteTransaction: JobTransaction {
    let database: Database

    /// Compiled once per connection.
    private func cached(_ sql: String) throws -> Statement { try database.cachedStatement(sql: sql) }

    private func execute(_ sql: String, _ arguments: StatementArguments) throws {
        try cached(sql).execute(arguments: arguments)
    }

    private func first<Value>(
        _ sql: String, _ arguments: StatementArguments, _ value: (Row) throws -> Value
    ) throws -> Value? {
        let rows = try Row.fetchCursor(cached(sql), arguments: arguments)
        // A row is the statement's present one: good for as long as the cursor.
        return try withExtendedLifetime(rows) { try rows.next().map(value) }
    }

    private func all<Value>(
        _ sql: String, _ arguments: StatementArguments = [], _ value: (Row) throws -> Value
    ) throws -> [Value] {
        let rows = try Row.fetchCursor(cached(sql), arguments: arguments)
        var values: [Value] = []
        while let row = try rows.next() { values.append(try value(row)) }
        return values
    }

    // MARK: Migrations

    private static let migrations =
        "SELECT id, key, state, request, manifest, result, findings, error, created_at, updated_at FROM migration"

    func migration(id: String) throws -> MigrationRecord? {
        try first("\(Self.migrations) WHERE id = ?", [id], migration)
    }

    func migration(key: String) throws -> MigrationRecord? {
        try first("\(Self.migrations) WHERE key = ?", [key], migration)
    }

    func migrationState(id: String) throws -> MigrationState? {
        try first("SELECT state FROM migration WHERE id = ?", [id]) { MigrationState(rawValue: $0[0]) ?? .unspecified }
    }

    func migrations(limit: Int?) throws -> [MigrationRecord] {
        try all("\(Self.migrations) ORDER BY created_at DESC, id LIMIT ?", [limit ?? -1], migration)
    }

    func migrations(in states: [MigrationState]) throws -> [MigrationRecord] {
        let list = states.map { "\($0.rawValue)" }.joined(separator: ", ")
        return try all("\(Self.migrations) WHERE state IN (\(list)) ORDER BY created_at, id", [], migration)
    }

    func save(_ record: MigrationRecord) throws {
        let findings = try Migration.with { $0.findings = record.findings }.serializedBytes() as [UInt8]
        try execute(
            """
            INSERT INTO migration (id, key, state, request, manifest, result, findings, error, created_at, updated_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET state = excluded.state, request = excluded.request,
                manifest = excluded.manifest, result = excluded.result, findings = excluded.findings,
                error = excluded.error, updated_at = excluded.updated_at
            """,
            [
                record.id, record.key, record.state.rawValue, try data(record.request), try record.manifest.map(data),
                try record.result.map(data), Data(findings), try record.error.map(data),
                record.createdAt.milliseconds, record.updatedAt.milliseconds,
            ])
    }

    private func migration(_ row: Row) throws -> MigrationRecord {
        MigrationRecord(
            id: row[0], key: row[1], request: try message(row[3]),
            state: MigrationState(rawValue: row[2]) ?? .unspecified, manifest: try optional(row[4]),
            result: try optional(row[5]), findings: try (message(row[6]) as Migration).findings,
            error: try optional(row[7]), createdAt: Moment(milliseconds: row[8]),
            updatedAt: Moment(milliseconds: row[9]))
    }

    // MARK: Tasks

    private static let tasks = """
        SELECT id, migration_id, stage, host, request, state, due_at, code, attempt, fence, failures, losses, unswept,
            deadline, started_at, ended_at
        FROM task
        """

    func task(id: String) throws -> TaskRecord? { try first("\(Self.tasks) WHERE id = ?", [id], task) }

    func tasks(ofMigration id: String) throws -> [TaskRecord] {
        let found = try all("\(Self.tasks) WHERE migration_id = ?", [id], task)
        return (Stage.way + [.undeploy]).compactMap { stage in found.first { $0.stage == stage } }
    }

    func dueTasks(now: Moment, or horizon: Moment, except hosts: Set<String>) throws -> [String] {
        try all(
            """
            SELECT id FROM task WHERE (due_at <= ? OR due_at > ?)
                AND (has_worker OR host NOT IN (SELECT value FROM json_each(?))
                    AND (stage = 'undeploy' OR host NOT IN (SELECT name FROM host WHERE drained)))
            ORDER BY due_at
            """,
            [now.milliseconds, horizon.milliseconds, names(hosts)]
        ) { $0[0] }
    }

    func tasksSent(to host: String, before moment: Moment, or horizon: Moment) throws -> [TaskRecord] {
        try all(
            "\(Self.tasks) WHERE host = ? AND has_worker AND due_at IS NULL AND (sent_at < ? OR sent_at > ?)",
            [host, moment.milliseconds, horizon.milliseconds], task)
    }

    func expiredTasks(now: Moment, grace: Duration) throws -> [String] {
        try all(
            """
            SELECT id FROM task WHERE ended_at IS NULL AND deadline <= ?
                AND (state IN ('waiting', 'sent') OR state = 'running' AND deadline <= ?)
            """,
            [now.milliseconds, (now - grace).milliseconds]
        ) { $0[0] }
    }

    func unsweptTasks(of host: String) throws -> [TaskRecord] {
        try all("\(Self.tasks) WHERE host = ? AND unswept", [host], task)
    }

    func tasksWithWorkers() throws -> [TaskRecord] { try all("\(Self.tasks) WHERE has_worker", [], task) }

    func save(_ record: TaskRecord) throws {
        let machine = record.machine
        let (state, due, code, hasWorker): (String, Moment?, Int?, Bool) =
            switch machine.state {
            case .waiting(let notBefore): ("waiting", notBefore, nil, false)
            case .sent: ("sent", nil, nil, true)
            case .running(let leaseUntil): ("running", leaseUntil, nil, true)
            case .succeeded: ("succeeded", nil, nil, false)
            case .failed(let code): ("failed", nil, code, false)
            case .cancelled: ("cancelled", nil, nil, false)
            }
        try execute(
            """
            INSERT INTO task (
                id, migration_id, stage, host, request, state, due_at, code, attempt, fence, failures, losses,
                unswept, has_worker, deadline, started_at, ended_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET host = excluded.host, request = excluded.request, state = excluded.state,
                due_at = excluded.due_at, code = excluded.code, attempt = excluded.attempt, fence = excluded.fence,
                failures = excluded.failures, losses = excluded.losses, unswept = excluded.unswept,
                has_worker = excluded.has_worker, deadline = excluded.deadline, started_at = excluded.started_at,
                ended_at = excluded.ended_at,
                sent_at = CASE WHEN state = excluded.state AND fence = excluded.fence THEN sent_at END
            """,
            [
                record.id, record.migrationID, record.stage.rawValue, record.host, Data(record.request), state,
                due?.milliseconds, code, machine.attempt, Int64(clamping: machine.fence), machine.failures,
                machine.losses, machine.isUnswept, hasWorker, record.deadline?.milliseconds,
                record.startedAt?.milliseconds,
                record.endedAt?.milliseconds,
            ])
    }

    private func task(_ row: Row) throws -> TaskRecord {
        let due = (row[6] as Int64?).map(Moment.init(milliseconds:))
        let state: TaskMachine.State? =
            switch row[5] as String {
            case "waiting": due.map(TaskMachine.State.waiting)
            case "sent": .sent
            case "running": due.map(TaskMachine.State.running)
            case "succeeded": .succeeded
            case "failed": (row[7] as Int?).map(TaskMachine.State.failed)
            case "cancelled": .cancelled
            default: nil
            }
        guard let stage = Stage(rawValue: row[2]), let state else {
            throw MigrationError(.dataLoss, "store: task \(row[0] as String) has an unknown stage or state")
        }
        var record = TaskRecord(
            migrationID: row[1], stage: stage, host: row[3], request: [UInt8](row[4] as Data),
            now: Moment(milliseconds: 0))
        record.machine = TaskMachine(
            state: state, attempt: row[8], fence: UInt64(row[9] as Int64), failures: row[10], losses: row[11],
            isUnswept: row[12])
        record.deadline = (row[13] as Int64?).map(Moment.init(milliseconds:))
        record.startedAt = (row[14] as Int64?).map(Moment.init(milliseconds:))
        record.endedAt = (row[15] as Int64?).map(Moment.init(milliseconds:))
        return record
    }

    // MARK: Outbox

    func enqueue(_ message: OutboxRecord) throws {
        try execute(
            """
            INSERT INTO outbox (id, task_id, attempt, fence, method, host, deadline, body)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            [
                message.id, message.identity.task, message.identity.attempt, Int64(clamping: message.identity.fence),
                message.method, message.host, message.deadline?.milliseconds, Data(message.body),
            ])
    }

    func unsent(limit: Int, except hosts: Set<String>) throws -> [OutboxRecord] {
        try all(
            """
            SELECT id, task_id, attempt, fence, method, host, deadline, body FROM outbox
            WHERE host NOT IN (SELECT value FROM json_each(?)) ORDER BY number LIMIT ?
            """,
            [names(hosts), limit]
        ) { row in
            OutboxRecord(
                id: row[0], identity: CallIdentity(task: row[1], attempt: row[2], fence: UInt64(row[3] as Int64)),
                method: row[4], host: row[5], deadline: (row[6] as Int64?).map(Moment.init(milliseconds:)),
                body: [UInt8](row[7] as Data))
        }
    }

    func markSent(_ id: String, at: Moment) throws {
        try execute(
            "UPDATE task SET sent_at = ? WHERE id = (SELECT task_id FROM outbox WHERE id = ?)",
            [at.milliseconds, id])
        try execute("DELETE FROM outbox WHERE id = ?", [id])
    }

    func discardUnsent(task: String) throws {
        try execute("DELETE FROM outbox WHERE task_id = ?", [task])
    }

    func enqueue(_ notification: NotificationRecord) throws {
        try execute(
            "INSERT INTO notification (id, routing_key, body) VALUES (?, ?, ?)",
            [notification.id, notification.routingKey, Data(notification.body)])
    }

    func notifications(limit: Int) throws -> [NotificationRecord] {
        try all("SELECT id, routing_key, body FROM notification ORDER BY number LIMIT ?", [limit]) {
            NotificationRecord(id: $0[0], routingKey: $0[1], body: [UInt8]($0[2] as Data))
        }
    }

    func removeNotification(_ id: String) throws {
        try execute("DELETE FROM notification WHERE id = ?", [id])
    }

    // MARK: Events and hosts

    func note(_ event: TaskEvent, kind: String, at: Moment) throws -> Bool {
        try execute(
            "INSERT OR IGNORE INTO event (task_id, fence, seq, kind, at) VALUES (?, ?, ?, ?, ?)",
            [event.taskID, Int64(clamping: event.fence), Int64(clamping: event.seq), kind, at.milliseconds])
        return database.changesCount > 0
    }

    func wasNoted(_ kind: String, of task: String, after: UInt64, before: UInt64) throws -> Bool {
        try first(
            "SELECT EXISTS (SELECT 1 FROM event WHERE task_id = ? AND fence > ? AND fence < ? AND kind = ?)",
            [task, Int64(clamping: after), Int64(clamping: before), kind]
        ) { $0[0] } ?? false
    }

    func note(request mark: String, _ migrations: [String]) throws {
        try execute(
            "INSERT OR REPLACE INTO request (mark, migrations) VALUES (?, ?)",
            [mark, migrations.joined(separator: "\n")])
        try execute("DELETE FROM request WHERE number <= ?", [database.lastInsertedRowID - 10_000])
    }

    func migrations(ofRequest mark: String) throws -> [String]? {
        try first("SELECT migrations FROM request WHERE mark = ?", [mark]) { row in
            (row[0] as String).split(separator: "\n").map(String.init)
        }
    }

    func note(_ rejected: MessageRejected, by member: String, at: Moment) throws {
        try execute(
            "INSERT INTO rejection (member, rejected, at) VALUES (?, ?, ?)",
            [member, try data(rejected), at.milliseconds])
        // A storm of forged messages must not fill the disk.
        try execute("DELETE FROM rejection WHERE number <= ?", [database.lastInsertedRowID - 10_000])
    }

    func rejections(limit: Int) throws -> [RejectionRecord] {
        try all("SELECT rejected, member, at FROM rejection ORDER BY number DESC LIMIT ?", [limit]) {
            RejectionRecord(rejected: try message($0[0]), member: $0[1], at: Moment(milliseconds: $0[2]))
        }
    }

    private static let hosts = """
        SELECT profile, seen_at, drained, (SELECT count(*) FROM task WHERE task.host = host.name AND has_worker) FROM host
        """

    func host(_ name: String) throws -> HostRecord? { try first("\(Self.hosts) WHERE name = ?", [name], host) }

    func hosts() throws -> [HostRecord] { try all("\(Self.hosts) ORDER BY name", [], host) }

    func hostNames() throws -> [String] { try all("SELECT name FROM host", []) { $0[0] } }

    func save(_ profile: HostProfile, at: Moment) throws {
        try execute(
            """
            INSERT INTO host (name, profile, seen_at) VALUES (?, ?, ?)
            ON CONFLICT (name) DO UPDATE SET profile = excluded.profile, seen_at = excluded.seen_at
            """,
            [profile.name, try data(profile), at.milliseconds])
    }

    func touch(host: String, at: Moment) throws {
        try execute("UPDATE host SET seen_at = ? WHERE name = ?", [at.milliseconds, host])
    }

    func isDrained(host: String) throws -> Bool {
        try first("SELECT drained FROM host WHERE name = ?", [host]) { $0[0] } ?? false
    }

    func setDrained(_ isDrained: Bool, host: String) throws {
        try execute("UPDATE host SET drained = ? WHERE name = ?", [isDrained, host])
    }

    private func host(_ row: Row) throws -> HostRecord {
        HostRecord(
            profile: try message(row[0]), seenAt: Moment(milliseconds: row[1]), isDrained: row[2], tasks: row[3])
    }

    // MARK: Messages

    private func names(_ hosts: Set<String>) throws -> String {
        String(decoding: try JSONEncoder().encode(hosts), as: UTF8.self)
    }

    private func data(_ message: some SwiftProtobuf.Message) throws -> Data { try message.serializedBytes() }

    private func message<Value: SwiftProtobuf.Message>(_ data: Data) throws -> Value {
        try Value(serializedBytes: data)
    }

    private func optional<Value: SwiftProtobuf.Message>(_ data: Data?) throws -> Value? {
        try data.map { try message($0) }
    }
}
