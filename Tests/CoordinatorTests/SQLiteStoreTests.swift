import Coordinator
import FlotillaProtocol
import GRDB
import MigrationModel
import TestKit
import Testing

@Suite struct SQLiteStoreTests {
    private static let states: [TaskMachine.State] = [
        .waiting(notBefore: Moment(milliseconds: 5)), .sent, .running(leaseUntil: Moment(milliseconds: 7)), .succeeded,
        .failed(code: 14), .cancelled,
    ]

    private func id(_ number: Int) -> String { Stage.export.taskID(ofMigration: "m\(number)") }

    /// A task in each state, each with its own attempt, fence and failures.
    private func fill(_ store: SQLiteStore) async throws {
        try await store.write { store in
            for (number, state) in Self.states.enumerated() {
                let now = Moment(milliseconds: 1)
                try store.save(
                    MigrationRecord(
                        id: "m\(number)", key: "m\(number)", request: SubmitMigrationRequest(), state: .exporting,
                        createdAt: now, updatedAt: now))
                var task = TaskRecord(
                    migrationID: "m\(number)", stage: .export, host: "kvm1", request: [UInt8(number)], now: now)
                task.machine = TaskMachine(
                    state: state, attempt: UInt32(number + 1), fence: UInt64(number + 2), failures: number,
                    losses: number + 3, isUnswept: state == .cancelled)
                task.startedAt = Moment(milliseconds: 3)
                try store.save(task)
            }
        }
    }

    /// - Parameter isOld: a store that knew nothing of losses and of sweeping.
    private func expectAll(_ store: SQLiteStore, isOld: Bool = false) async throws {
        for (number, state) in Self.states.enumerated() {
            let found = try await store.write { [id = id(number)] in try $0.task(id: id) }
            let task = try #require(found)
            let expected = TaskMachine(
                state: state, attempt: UInt32(number + 1), fence: UInt64(number + 2), failures: number,
                losses: isOld ? 0 : number + 3, isUnswept: !isOld && state == .cancelled)
            #expect(task.machine == expected)
            #expect(task.request == [UInt8(number)])
            #expect(task.startedAt == Moment(milliseconds: 3))
            #expect(task.endedAt == nil)
        }
    }

    @Test func idsOfMigrationsFollowTheirTime() {
        let moments = [0, 1, 255, 256, 1 << 40, 1_764_000_000_000, 1_764_000_000_001].map { Moment(milliseconds: $0) }
        let ids = moments.map { makeMigrationID(at: $0) }
        #expect(ids == ids.sorted())
        #expect(ids[3].hasPrefix("00000000-0100-7"))
        #expect(ids.allSatisfy { $0.count == 36 && "89ab".contains($0.dropFirst(19).first ?? " ") })
        #expect(makeMigrationID(at: moments[0]) != ids[0])
    }

    @Test func everyStateOfATaskIsKept() async throws {
        let folder = try TemporaryFolder()
        let store = try SQLiteStore(path: "\(folder.path)/store.sqlite")
        try await fill(store)
        try await expectAll(store)
        let due = try await store.write {
            try $0.dueTasks(now: Moment(milliseconds: 7), or: Moment(milliseconds: 9), except: [])
        }
        #expect(due == [id(0), id(2)])
        #expect(try await store.write { try $0.unsweptTasks(of: "kvm1").map(\.id) } == [id(5)])
        #expect(try await store.write { try $0.unsweptTasks(of: "kvm2").isEmpty })
        #expect(try await store.write { try $0.tasksWithWorkers().map(\.id) }.sorted() == [id(1), id(2)])
    }

    /// Of the time when a task's machine was one JSON value.
    @Test func olderStoresAreTakenOver() async throws {
        let folder = try TemporaryFolder()
        let path = "\(folder.path)/store.sqlite"
        try await fill(try SQLiteStore(path: path))
        try await DatabaseQueue(path: path).write { database in
            try database.execute(
                sql: """
                    ALTER TABLE task ADD COLUMN machine TEXT NOT NULL DEFAULT '';
                    UPDATE task SET machine = json_object(
                        'state', json_object(state, CASE state
                            WHEN 'waiting' THEN json_object('notBefore', json_object('milliseconds', due_at))
                            WHEN 'running' THEN json_object('leaseUntil', json_object('milliseconds', due_at))
                            WHEN 'failed' THEN json_object('code', code)
                            ELSE json_object() END),
                        'attempt', attempt, 'fence', fence, 'failures', failures);
                    ALTER TABLE task DROP COLUMN state;
                    ALTER TABLE task DROP COLUMN code;
                    ALTER TABLE task DROP COLUMN attempt;
                    ALTER TABLE task DROP COLUMN fence;
                    ALTER TABLE task DROP COLUMN failures;
                    ALTER TABLE task DROP COLUMN losses;
                    DROP INDEX task_unswept;
                    DROP INDEX task_deadline;
                    ALTER TABLE task DROP COLUMN deadline;
                    ALTER TABLE task DROP COLUMN unswept;
                    DROP INDEX outbox_of_task;
                    DELETE FROM grdb_migrations WHERE identifier IN ('3', '4', '5');
                    """)
        }
        try await expectAll(try SQLiteStore(path: path), isOld: true)
    }
}
