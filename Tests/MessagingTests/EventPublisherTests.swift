import FlotillaProtocol
import Messaging
import SwiftProtobuf
import TestKit
import Testing

@Suite struct EventPublisherTests {
    /// What doctor asks: a message with no event goes the way of every event, and is believed.
    @Test func probeIsAMessageWithoutEvents() async throws {
        let (bus, names, members) = (InProcessBus(), Names(), FleetMember.pair(host: "kvm1"))
        try await bus.declare(names.topology(hosts: ["kvm1"]))
        let subscription = try await bus.subscribe(names.coordinatorEvents, prefetch: 1)
        try await EventPublisher(bus: bus, names: names, member: members.worker).probe()
        var iterator = subscription.deliveries.makeAsyncIterator()
        let next = await iterator.next(isolation: #isolation)
        let delivery = try #require(next)
        await delivery.settle(.ack)
        subscription.cancel()
        #expect(delivery.message.routingKey == "evt.kvm1.task")
        #expect(try members.coordinator.verify(delivery.message) == "kvm1")
        let events = try WorkerEvents(serializedBytes: delivery.message.body)
        #expect(events.host == "kvm1" && events.events.isEmpty)
    }
}
