import FlotillaProtocol
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Coordinator

@Suite struct RequestTests {
    /// The connection broke before the broker knew that it was heard.
    @Test func aCopyOfARequestIsAnsweredAndBeginsNothing() async throws {
        let rig = try Rig()
        let store = try SQLiteStore(path: "\(rig.folder.path)/store.sqlite")
        try await store.write { try $0.save(.with { $0.name = Rig.host }, at: .now) }
        let bus = WatchedBus()
        bus.set(BusStatus(connections: [], consumers: []))
        var settings = Coordinator.Settings()
        settings.requesters = ["portal"]
        let coordinator = Coordinator(
            store: store, bus: bus, member: rig.members.coordinator, settings: settings,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })

        var message = Messaging.Message(exchange: "", routingKey: "", body: try Rig.request.serializedBytes())
        message.type = "/flotilla.v1.CoordinatorService/SubmitMigration"
        message.contentType = "application/protobuf"
        (message.userID, message.messageID) = ("portal", "one")
        func deliver(redeliveries: Int) async throws -> MigrationRecord {
            let (deliveries, continuation) = AsyncStream<Delivery>.makeStream()
            continuation.yield(
                Delivery(message: message, redeliveries: redeliveries) { #expect($0 == .ack) })
            continuation.finish()
            try await coordinator.serve(Subscription(deliveries: deliveries) {})
            let all = try await store.write { try $0.migrations(in: MigrationState.allCases) }
            #expect(all.count == 1)
            return try #require(all.first)
        }

        let first = try await deliver(redeliveries: 0)
        #expect(first.state == .exporting)
        _ = try await coordinator.decide { try $0.cancel(first.id) }
        #expect(try await deliver(redeliveries: 1).state == .cancelled)
        let answers = try await store.write { try $0.notifications(limit: 99) }.filter {
            $0.routingKey.hasPrefix("request")
        }
        #expect(answers.count == 2)
        // Whoever asks again is heard.
        #expect(try await deliver(redeliveries: 0).state == .exporting)
    }
}
