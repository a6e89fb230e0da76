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
        // Somebody may look at it with other programs.
        configuration.busyMode = .timeout(5)
        configuration.prepareDatabase { database in
            try database.execute(
                sql: "PRAGMA synchronous = FULL; PRAGMA cache_size = -32768; PRAGMA wal_autocheckpoint = 4000")
        }
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
            return try await database.write { try body(SQLiteTransaction(database: $0)) }
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
        // A task's machine was one JSON value, which cost more than everything else about a task. When it waits until or
        // its lease runs out is in `due_at`.
        migrator.registerMigration("3") { database in
            try database.execute(
                sql: """
                    ALTER TABLE task ADD COLUMN state TEXT NOT NULL DEFAULT '';
                    ALTER TABLE task ADD COLUMN code INTEGER;
                    ALTER TABLE task ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;
                    ALTER TABLE task ADD COLUMN fence INTEGER NOT NULL DEFAULT 0;
                    ALTER TABLE task ADD COLUMN failures INTEGER NOT NULL DEFAULT 0;
                    UPDATE task SET state = (SELECT key FROM json_each(machine, '$.state')),
                        code = json_extract(machine, '$.state.failed.code'), attempt = json_extract(machine, '$.attempt'),
                        fence = json_extract(machine, '$.fence'), failures = json_extract(machine, '$.failures');
                    ALTER TABLE task DROP COLUMN machine;
                    CREATE INDEX outbox_of_task ON outbox(task_id);
                    """)
        }
        migrator.registerMigration("4") { database in
            try database.execute(sql: "ALTER TABLE task ADD COLUMN losses INTEGER NOT NULL DEFAULT 0")
        }
        migrator.registerMigration("5") { database in
            try database.execute(
                sql: """
                    ALTER TABLE task ADD COLUMN unswept INTEGER NOT NULL DEFAULT 0;
                    CREATE INDEX task_unswept ON task(host) WHERE unswept;
                    ALTER TABLE task ADD COLUMN deadline INTEGER;
                    CREATE INDEX task_deadline ON task(deadline) WHERE deadline IS NOT NULL AND ended_at IS NULL;
                    """)
        }
        migrator.registerMigration("6") { database in
            try database.execute(
                sql: """
                    CREATE TABLE request (number INTEGER PRIMARY KEY, mark TEXT NOT NULL UNIQUE, migrations TEXT NOT NULL)
                    STRICT;
                    """)
        }
        return migrator
    }
}
