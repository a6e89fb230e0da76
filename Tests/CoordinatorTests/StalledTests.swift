import Coordinator
import FlotillaProtocol
import GRPCCore
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// Queues that take nothing, and whom that must not hold up.
@Suite(.timeLimit(.minutes(1))) struct StalledTests {
    private let rig: Rig
    private let store: SQLiteStore

    init() throws {
        rig = try Rig()
        store = try SQLiteStore(path: "\(rig.folder.path)/store.sqlite")
    }

    private func coordinator(_ bus: WatchedBus, requesters: Set<String> = []) -> Coordinator {
        var settings = Coordinator.Settings(tick: .milliseconds(5))
        settings.requesters = requesters
        return Coordinator(
            store: store, bus: bus, member: rig.members.coordinator, settings: settings,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
    }

    @Test func hostThatCannotBeToldKeepsNoDecisionWaiting() async throws {
        let bus = WatchedBus(stalled: Rig.host)
        bus.set(BusStatus(connections: [], consumers: []))
        try await rig.process(on: bus) { client, worker in
            let call = TaskCall(
                identity: CallIdentity(task: "unknown", attempt: 1, fence: 1),
                method: "flotilla.v1.ExportService/Export",
                audience: Rig.host, body: [])
            try await worker.fail(call, .cancelled, "nothing is left")
            #expect(try await eventually { bus.published(Rig.host).isEmpty ? nil : true } == true)
            worker.profile.cpus = 33
            try await worker.announce()
            let isHeard = try await eventually {
                try await client.listHosts(.init()).hosts.first?.profile.cpus == 33 ? true : nil
            }
            #expect(isHeard == true)
        }
    }

    @Test func hostIsToldThroughABrokerToo() async throws {
        let bus = WatchedBus()
        bus.set(BusStatus(connections: [], consumers: []))
        try await rig.process(on: bus) { client, worker in
            _ = try await eventually { try await client.listHosts(.init()).hosts.isEmpty ? nil : true }
            let migration = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            try await worker.work(.convert)
            try await worker.work(.deploy)
            #expect(try await client.end(migration.id).state == .done)
        }
    }

    /// What a queue doesn't take stays in the bus's window for long, and that is everybody's.
    @Test func hostWhoseQueueTakesNothingIsTriedWithOneTask() async throws {
        try await store.write { store in
            for number in 0..<100 {
                try store.enqueue(
                    OutboxRecord(
                        id: "\(number)", identity: CallIdentity(task: "\(number)", attempt: 1, fence: 1),
                        method: "flotilla.v1.ExportService/Export", host: Rig.host, body: [1]))
            }
        }
        let bus = WatchedBus(refused: (Rig.host, .unavailable))
        let running = Task { [coordinator = self.coordinator(bus)] in try await coordinator.run { [Rig.host] } }
        let tried = try #require(
            try await eventually {
                let tried = bus.published(Rig.host)
                return tried.count > 35 ? tried : nil
            })
        #expect(Set(tried.prefix(32)) == Set((0..<32).map(String.init)))
        #expect(Set(tried.dropFirst(32)) == ["0"])
        bus.accept()
        let isEmpty = try await eventually { [store] in
            try await store.write { try $0.unsent(limit: 1, except: []).isEmpty } ? true : nil
        }
        #expect(isEmpty == true)
        running.cancel()
        _ = await running.result
    }

    @Test func taskThatIsOverIsNotSent() async throws {
        let bus = WatchedBus(stalled: Rig.host)
        bus.set(BusStatus(connections: [], consumers: []))
        try await rig.process(on: bus) { [store] client, _ in
            _ = try await eventually { try await client.listHosts(.init()).hosts.isEmpty ? nil : true }
            let migration = try await client.submitMigration(Rig.request)
            #expect(try await store.write { try $0.unsent(limit: 9, except: []).count } == 1)
            _ = try await client.cancelMigration(.with { $0.id = migration.id })
            #expect(try await store.write { try $0.unsent(limit: 9, except: []).isEmpty })
        }
    }

    /// Each is tried several times; a listener's queue that takes none holds up no other.
    @Test(arguments: [MigrationError.Code.unavailable, .resourceExhausted])
    func notificationThatAQueueDoesNotTakeIsGivenUp(_ code: MigrationError.Code) async throws {
        try await store.write { store in
            for type in ["migration.exporting", "migration.done"] {
                try store.enqueue(NotificationRecord(id: type, routingKey: type, body: [1]))
            }
        }
        let bus = WatchedBus(refused: ("migration.exporting", code))
        let coordinator = self.coordinator(bus, requesters: ["client"])
        let running = Task { try await coordinator.run { [Rig.host] } }
        #expect(try await eventually { bus.published("migration.done").isEmpty ? nil : true } == true)
        #expect(bus.published("migration.exporting").count == 3)
        running.cancel()
        _ = await running.result
    }

    /// Who is stalled for one kind costs the others of that kind nothing, whatever else is taken between them.
    @Test func stalledListenerIsWaitedForOnce() async throws {
        try await store.write { store in
            for number in 0..<3 {
                for type in ["migration.exporting", "migration.done"] {
                    try store.enqueue(NotificationRecord(id: "\(type)-\(number)", routingKey: type, body: [1]))
                }
            }
        }
        let bus = WatchedBus(refused: ("migration.exporting", .unavailable), after: .milliseconds(500))
        let coordinator = self.coordinator(bus, requesters: ["client"])
        let start = ContinuousClock.now
        let running = Task { try await coordinator.run { [Rig.host] } }
        #expect(try await eventually { bus.published("migration.done").count == 3 ? true : nil } == true)
        #expect(start.duration(to: .now) < .milliseconds(2500))
        #expect(
            bus.published("migration.exporting")
                == [0, 0, 0, 1, 2].map { "migration.exporting-\($0)" })
        #expect(bus.published("migration.done") == (0..<3).map { "migration.done-\($0)" })
        let isEmpty = try await eventually { [store] in
            try await store.write { try $0.notifications(limit: 1).isEmpty } ? true : nil
        }
        #expect(isEmpty == true)
        running.cancel()
        _ = await running.result
    }

    @Test(arguments: [
        "vsphere://root:secret@vc.example/DC", "vsphere://root:sec/ret@vc.example", "vsphere://a:sec@ret@vc.example",
        "ova:https://secret@files.example/web.ova",
    ])
    func passwordInTheSourceIsRefused(_ url: String) async throws {
        var request = Rig.request
        request.sourceURL = url
        try await rig.process { [request] client, _ in
            await #expect { _ = try await client.submitMigration(request) } throws: { error in
                let error = error as? RPCError
                return error?.code == .invalidArgument && error?.message.contains("sec") == false
            }
            let left = try await client.listMigrations(.init()).migrations
            #expect(left.isEmpty)
        }
    }

    @Test(arguments: ["vsphere://root@vc.example:443/DC", "vsphere://a%40b@vc.example", "ova:/images/a:b@c.ova"])
    func sourceWithoutPasswordIsTaken(_ url: String) async throws {
        var request = Rig.request
        request.sourceURL = url
        try await rig.process { [request] client, _ in
            let migration = try await client.submitMigration(request)
            #expect(migration.state == .exporting)
        }
    }
}
