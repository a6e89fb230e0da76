import FlotillaProtocol
import FoundationEssentials
import GRDB
import MigrationModel
import SwiftProtobuf

/// A `JobStore` in one SQLite file, WAL mode, fsynced at every commit.
package final class SQLiteStore: JobStore {
    private let database: DatabaseQueue

    /// Opens or creates the file and brings its schema up to date. Throws `failedPrecondition` when a newer version
    /// of this program wrote it.
    package init(path: String) throws {
        var configuration = Configuration()
        configuration.journalMode = .wal
        configuration.prepareDatabase { try $0.execute(sql: "PRAGMA synchronous = FULL") }
        do {
            database = try DatabaseQueue(path: path, configuration: configuration)
            let migrator = Self.migrator
            if try database.read(migrator.hasBeenSuperseded) {
                throw MigrationError(
                    .failedPrecondition, "store \(path) was written by a newer version of flotilla",
                    hint: "use that version, or another --state folder")
            }
            try migrator.migrate(database)
        } catch let error as DatabaseError {
            throw MigrationError(.failedPrecondition, "store \(path) can't be opened", cause: error)
        }
    }

    package func write<Value: Sendable>(
        _ body: @escaping @Sendable (any JobTransaction) throws -> Value
    ) async throws -> Value {
        do {
            return try await database.write { try body(Transaction(database: $0)) }
        } catch let error as DatabaseError {
            let path = database.path
            switch error.resultCode {
            case .SQLITE_FULL:
                throw MigrationError(
                    .resourceExhausted, "store \(path) can't grow",
                    hint: "free some space and run the same command again",
                    cause: error)
            case .SQLITE_IOERR, .SQLITE_CORRUPT, .SQLITE_NOTADB:
                throw MigrationError(.dataLoss, "store \(path)", hint: "check the disk it lies on", cause: error)
            default: throw MigrationError(.internal, "store \(path)", cause: error)
            }
        }
    }

    private static var migrator: DatabaseMigrator {
        var migrator = DatabaseMigrator()
        migrator.registerMigration("1") { database in
            try database.execute(
                sql: """
                    CREATE TABLE migration (
                        id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, state INTEGER NOT NULL, request BLOB NOT NULL,
                        manifest BLOB, result BLOB, findings BLOB NOT NULL, error BLOB,
                        created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL
                    ) STRICT;
                    CREATE TABLE task (
                        id TEXT PRIMARY KEY, migration_id TEXT NOT NULL REFERENCES migration(id), stage TEXT NOT NULL,
                        host TEXT NOT NULL, request BLOB NOT NULL, machine TEXT NOT NULL,
                        due_at INTEGER, has_worker INTEGER NOT NULL, started_at INTEGER, ended_at INTEGER
                    ) STRICT;
                    CREATE INDEX task_by_migration ON task(migration_id);
                    CREATE INDEX task_due ON task(due_at) WHERE due_at IS NOT NULL;
                    CREATE TABLE outbox (
                        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task_id TEXT NOT NULL,
                        attempt INTEGER NOT NULL, fence INTEGER NOT NULL, method TEXT NOT NULL, host TEXT NOT NULL,
                        deadline INTEGER, body BLOB NOT NULL
                    ) STRICT;
                    CREATE TABLE event (
                        task_id TEXT NOT NULL, fence INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL,
                        at INTEGER NOT NULL, PRIMARY KEY (task_id, fence, seq, kind)
                    ) STRICT, WITHOUT ROWID;
                    CREATE TABLE host (name TEXT PRIMARY KEY, profile BLOB NOT NULL) STRICT;
                    """)
        }
        migrator.registerMigration("2") { database in
            try database.execute(
                sql: """
                    CREATE TABLE rejection (
                        number INTEGER PRIMARY KEY, member TEXT NOT NULL, rejected BLOB NOT NULL, at INTEGER NOT NULL
                    ) STRICT;
                    CREATE TABLE notification (
                        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, routing_key TEXT NOT NULL,
                        body BLOB NOT NULL
                    ) STRICT;
                    ALTER TABLE host ADD COLUMN seen_at INTEGER NOT NULL DEFAULT 0;
                    ALTER TABLE host ADD COLUMN drained INTEGER NOT NULL DEFAULT 0;
                    ALTER TABLE task ADD COLUMN sent_at INTEGER;
                    CREATE INDEX task_of_worker ON task(host) WHERE has_worker;
                    """)
        }
        return migrator
    }
}

/// Rows to records and back. Lives only inside one transaction.
private struct Transaction: JobTransaction {
    let database: Database

    /// Compiled once per connection.
    private func cached(_ sql: String) throws -> Statement { try database.cachedStatement(sql: sql) }

    private func execute(_ sql: String, arguments: StatementArguments) throws {
        try cached(sql).execute(arguments: arguments)
    }

    // MARK: Migrations

    func migration(id: String) throws -> MigrationRecord? {
        try Row.fetchOne(cached("SELECT * FROM migration WHERE id = ?"), arguments: [id]).map(migration)
    }

    func migration(key: String) throws -> MigrationRecord? {
        try Row.fetchOne(cached("SELECT * FROM migration WHERE key = ?"), arguments: [key]).map(migration)
    }

    func migrations(limit: Int?) throws -> [MigrationRecord] {
        try Row.fetchAll(
            cached("SELECT * FROM migration ORDER BY created_at DESC, id LIMIT ?"), arguments: [limit ?? -1]
        ).map(migration)
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
            arguments: [
                record.id, record.key, record.state.rawValue, try data(record.request), try record.manifest.map(data),
                try record.result.map(data), Data(findings), try record.error.map(data),
                record.createdAt.milliseconds, record.updatedAt.milliseconds,
            ])
    }

    private func migration(_ row: Row) throws -> MigrationRecord {
        MigrationRecord(
            id: row["id"], key: row["key"], request: try message(row["request"]),
            state: MigrationState(rawValue: row["state"]) ?? .unspecified,
            manifest: try optional(row["manifest"]), result: try optional(row["result"]),
            findings: try (message(row["findings"]) as Migration).findings, error: try optional(row["error"]),
            createdAt: Moment(milliseconds: row["created_at"]), updatedAt: Moment(milliseconds: row["updated_at"]))
    }

    // MARK: Tasks

    func task(id: String) throws -> TaskRecord? {
        try Row.fetchOne(cached("SELECT * FROM task WHERE id = ?"), arguments: [id]).map(task)
    }

    func tasks(ofMigration id: String) throws -> [TaskRecord] {
        let found = try Row.fetchAll(cached("SELECT * FROM task WHERE migration_id = ?"), arguments: [id])
            .map(task)
        return Stage.allCases.compactMap { stage in found.first { $0.stage == stage } }
    }

    func dueTasks(now: Moment, or horizon: Moment) throws -> [String] {
        try Row.fetchAll(
            cached(
                """
                SELECT id FROM task WHERE (due_at <= ? OR due_at > ?)
                    AND (has_worker OR host NOT IN (SELECT name FROM host WHERE drained)) ORDER BY due_at
                """),
            arguments: [now.milliseconds, horizon.milliseconds]
        ).map { $0["id"] }
    }

    func tasksSent(to host: String, before moment: Moment, or horizon: Moment) throws -> [TaskRecord] {
        try Row.fetchAll(
            cached(
                """
                SELECT * FROM task WHERE host = ? AND has_worker AND due_at IS NULL AND (sent_at < ? OR sent_at > ?)
                """),
            arguments: [host, moment.milliseconds, horizon.milliseconds]
        ).map(task)
    }

    func tasksWithWorkers() throws -> [TaskRecord] {
        try Row.fetchAll(cached("SELECT * FROM task WHERE has_worker")).map(task)
    }

    func save(_ record: TaskRecord) throws {
        let (due, hasWorker): (Moment?, Bool) =
            switch record.machine.state {
            case .waiting(let notBefore): (notBefore, false)
            case .running(let leaseUntil): (leaseUntil, true)
            case .sent: (nil, true)
            case .succeeded, .failed, .cancelled: (nil, false)
            }
        let machine = String(decoding: try JSONEncoder().encode(record.machine), as: UTF8.self)
        try execute(
            """
            INSERT INTO task (id, migration_id, stage, host, request, machine, due_at, has_worker, started_at, ended_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET host = excluded.host, request = excluded.request,
                machine = excluded.machine, due_at = excluded.due_at, has_worker = excluded.has_worker,
                sent_at = CASE WHEN machine = excluded.machine THEN sent_at END,
                started_at = excluded.started_at, ended_at = excluded.ended_at
            """,
            arguments: [
                record.id, record.migrationID, record.stage.rawValue, record.host, Data(record.request), machine,
                due?.milliseconds, hasWorker, record.startedAt?.milliseconds, record.endedAt?.milliseconds,
            ])
    }

    private func task(_ row: Row) throws -> TaskRecord {
        guard let stage = Stage(rawValue: row["stage"]) else {
            throw MigrationError(.dataLoss, "store: task \(row["id"] as String) has an unknown stage")
        }
        var record = TaskRecord(
            migrationID: row["migration_id"], stage: stage, host: row["host"],
            request: [UInt8](row["request"] as Data), now: Moment(milliseconds: 0))
        record.machine = try JSONDecoder().decode(TaskMachine.self, from: Data((row["machine"] as String).utf8))
        record.startedAt = (row["started_at"] as Int64?).map(Moment.init(milliseconds:))
        record.endedAt = (row["ended_at"] as Int64?).map(Moment.init(milliseconds:))
        return record
    }

    // MARK: Outbox

    func enqueue(_ message: OutboxRecord) throws {
        try execute(
            """
            INSERT INTO outbox (id, task_id, attempt, fence, method, host, deadline, body)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            arguments: [
                message.id, message.identity.task, message.identity.attempt, Int64(clamping: message.identity.fence),
                message.method, message.host, message.deadline?.milliseconds, Data(message.body),
            ])
    }

    func unsent(limit: Int) throws -> [OutboxRecord] {
        try Row.fetchAll(cached("SELECT * FROM outbox ORDER BY number LIMIT ?"), arguments: [limit]).map { row in
            OutboxRecord(
                id: row["id"],
                identity: CallIdentity(
                    task: row["task_id"], attempt: row["attempt"], fence: UInt64(row["fence"] as Int64)),
                method: row["method"], host: row["host"],
                deadline: (row["deadline"] as Int64?).map(Moment.init(milliseconds:)),
                body: [UInt8](row["body"] as Data))
        }
    }

    func markSent(_ id: String, at: Moment) throws {
        try execute(
            "UPDATE task SET sent_at = ? WHERE id = (SELECT task_id FROM outbox WHERE id = ?)",
            arguments: [at.milliseconds, id])
        try execute("DELETE FROM outbox WHERE id = ?", arguments: [id])
    }

    func discardUnsent(task: String) throws {
        try execute("DELETE FROM outbox WHERE task_id = ?", arguments: [task])
    }

    func enqueue(_ notification: NotificationRecord) throws {
        try execute(
            "INSERT INTO notification (id, routing_key, body) VALUES (?, ?, ?)",
            arguments: [notification.id, notification.routingKey, Data(notification.body)])
    }

    func notifications(limit: Int) throws -> [NotificationRecord] {
        try Row.fetchAll(cached("SELECT * FROM notification ORDER BY number LIMIT ?"), arguments: [limit]).map {
            NotificationRecord(id: $0["id"], routingKey: $0["routing_key"], body: [UInt8]($0["body"] as Data))
        }
    }

    func removeNotification(_ id: String) throws {
        try execute("DELETE FROM notification WHERE id = ?", arguments: [id])
    }

    // MARK: Events and hosts

    func note(_ event: TaskEvent, kind: String, at: Moment) throws -> Bool {
        try execute(
            "INSERT OR IGNORE INTO event (task_id, fence, seq, kind, at) VALUES (?, ?, ?, ?, ?)",
            arguments: [
                event.taskID, Int64(clamping: event.fence), Int64(clamping: event.seq), kind, at.milliseconds,
            ])
        return database.changesCount > 0
    }

    func note(_ rejected: MessageRejected, by member: String, at: Moment) throws {
        try execute(
            "INSERT INTO rejection (member, rejected, at) VALUES (?, ?, ?)",
            arguments: [member, try data(rejected), at.milliseconds])
        // A storm of forged messages must not fill the disk.
        try execute("DELETE FROM rejection WHERE number <= ?", arguments: [database.lastInsertedRowID - 10_000])
    }

    func rejections(limit: Int) throws -> [RejectionRecord] {
        try Row.fetchAll(cached("SELECT * FROM rejection ORDER BY number DESC LIMIT ?"), arguments: [limit])
            .map { row in
                RejectionRecord(
                    rejected: try message(row["rejected"]), member: row["member"],
                    at: Moment(milliseconds: row["at"]))
            }
    }

    private static let hostColumns =
        "profile, seen_at, drained, (SELECT count(*) FROM task WHERE task.host = host.name AND has_worker) AS tasks"

    func host(_ name: String) throws -> HostRecord? {
        try Row.fetchOne(cached("SELECT \(Self.hostColumns) FROM host WHERE name = ?"), arguments: [name])
            .map(host)
    }

    func hosts() throws -> [HostRecord] {
        try Row.fetchAll(cached("SELECT \(Self.hostColumns) FROM host ORDER BY name")).map(host)
    }

    func save(_ profile: HostProfile, at: Moment) throws {
        try execute(
            """
            INSERT INTO host (name, profile, seen_at) VALUES (?, ?, ?)
            ON CONFLICT (name) DO UPDATE SET profile = excluded.profile, seen_at = excluded.seen_at
            """,
            arguments: [profile.name, try data(profile), at.milliseconds])
    }

    func touch(host: String, at: Moment) throws {
        try execute("UPDATE host SET seen_at = ? WHERE name = ?", arguments: [at.milliseconds, host])
    }

    func isDrained(host: String) throws -> Bool {
        try Row.fetchOne(cached("SELECT drained FROM host WHERE name = ?"), arguments: [host])?["drained"] ?? false
    }

    func setDrained(_ isDrained: Bool, host: String) throws {
        try execute("UPDATE host SET drained = ? WHERE name = ?", arguments: [isDrained, host])
    }

    private func host(_ row: Row) throws -> HostRecord {
        HostRecord(
            profile: try message(row["profile"]), seenAt: Moment(milliseconds: row["seen_at"]),
            isDrained: row["drained"], tasks: row["tasks"])
    }

    // MARK: Messages

    private func data(_ message: some SwiftProtobuf.Message) throws -> Data { try message.serializedBytes() }

    private func message<Value: SwiftProtobuf.Message>(_ data: Data) throws -> Value {
        try Value(serializedBytes: data)
    }

    private func optional<Value: SwiftProtobuf.Message>(_ data: Data?) throws -> Value? {
        try data.map { try message($0) }
    }
}
