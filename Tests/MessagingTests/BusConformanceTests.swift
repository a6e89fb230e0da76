import Messaging
import MigrationModel
import Testing

/// What every bus must do. Each test gets a bus that is empty but for one topology.
@Suite struct BusConformanceTests {
    private let names = Names(namespace: "conformance")

    private func makeBus() async throws -> any MessageBus {
        let bus = InProcessBus()
        try await bus.declare(names.topology(hosts: ["kvm1", "kvm2"]))
        return bus
    }

    private func task(_ host: String, _ id: String) -> Message {
        var message = Message(exchange: names.tasks, routingKey: host, body: Array(id.utf8))
        message.messageID = id
        return message
    }

    private func next(_ iterator: inout AsyncStream<Delivery>.Iterator) async throws -> Delivery {
        let delivery = await iterator.next(isolation: #isolation)
        return try #require(delivery)
    }

    @Test func routesByHostInOrder() async throws {
        let bus = try await makeBus()
        for id in ["a", "b", "c"] { try await bus.publish(task("kvm1", id)) }
        try await bus.publish(task("kvm2", "other"))
        let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 10)
        var iterator = subscription.deliveries.makeAsyncIterator()
        for id in ["a", "b", "c"] {
            let delivery = try await next(&iterator)
            #expect(delivery.message.messageID == id)
            #expect(delivery.redeliveries == 0)
            await delivery.settle(.ack)
        }
        subscription.cancel()
        #expect(await iterator.next() == nil)
    }

    @Test func unroutableMessageIsAnErrorNotALoss() async throws {
        let bus = try await makeBus()
        await #expect { try await bus.publish(task("kvm9", "x")) } throws: {
            ($0 as? MigrationError)?.code == .notFound
        }
    }

    @Test func oversizedMessageIsRefused() async throws {
        let bus = try await makeBus()
        let message = Message(
            exchange: names.tasks, routingKey: "kvm1", body: [UInt8](repeating: 0, count: Message.maximumBody + 1))
        await #expect { try await bus.publish(message) } throws: {
            ($0 as? MigrationError)?.code == .resourceExhausted
        }
    }

    @Test func prefetchLimitsWhatIsUnsettled() async throws {
        let bus = try await makeBus()
        for id in ["a", "b", "c"] { try await bus.publish(task("kvm1", id)) }
        let one = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
        let two = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
        var (first, second) = (one.deliveries.makeAsyncIterator(), two.deliveries.makeAsyncIterator())
        let (a, b) = (try await next(&first), try await next(&second))
        #expect(Set([a.message.messageID, b.message.messageID]) == ["a", "b"])
        // Only a consumer with room gets the third.
        await b.settle(.ack)
        #expect(try await next(&second).message.messageID == "c")
        await a.settle(.ack)
    }

    @Test func unsettledDeliveriesGoBackInOrderWhenTheConsumerEnds() async throws {
        let bus = try await makeBus()
        for id in ["a", "b", "c"] { try await bus.publish(task("kvm1", id)) }
        let dying = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 2)
        var iterator = dying.deliveries.makeAsyncIterator()
        let held = try await next(&iterator)
        dying.cancel()
        let heir = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 3)
        var deliveries = heir.deliveries.makeAsyncIterator()
        var seen: [String: Int] = [:]
        for _ in 0..<3 {
            let delivery = try await next(&deliveries)
            seen[delivery.message.messageID] = delivery.redeliveries
            await delivery.settle(.ack)
        }
        #expect(seen == ["a": 1, "b": 1, "c": 0])
        // A settlement after the fact changes nothing.
        await held.settle(.requeue)
    }

    @Test func rejectedMessagesReachTheDeadLettersWithTheReason() async throws {
        let bus = try await makeBus()
        try await bus.publish(task("kvm1", "poison"))
        let tasks = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
        var iterator = tasks.deliveries.makeAsyncIterator()
        let delivery = try await next(&iterator)
        await delivery.settle(.reject(reason: "undecodable"))
        await delivery.settle(.requeue)
        let dead = try await bus.subscribe(names.dead, prefetch: 1)
        var letters = dead.deliveries.makeAsyncIterator()
        let letter = try await next(&letters).message
        #expect(letter.messageID == "poison")
        #expect(letter.headers["flotilla-death-reason"] == .string("undecodable"))
        #expect(letter.headers["flotilla-death-queue"] == .string(names.tasks(of: "kvm1")))
    }

    @Test func deliveryLimitIsABackstop() async throws {
        let bus = try await makeBus()
        try await bus.publish(task("kvm1", "again"))
        let tasks = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
        let consumer = Task {
            var count = 0
            for await delivery in tasks.deliveries {
                count += 1
                await delivery.settle(.requeue)
            }
            return count
        }
        let dead = try await bus.subscribe(names.dead, prefetch: 1)
        var letters = dead.deliveries.makeAsyncIterator()
        #expect(try await next(&letters).message.messageID == "again")
        tasks.cancel()
        #expect(await consumer.value == 11)
    }

    @Test(arguments: [
        ("evt.#", "evt.kvm1.ended", true), ("evt.*.ended", "evt.kvm1.ended", true), ("evt.*", "evt.kvm1.ended", false),
        ("#", "", true), ("evt.kvm1.#", "evt.kvm1", true), ("evt.kvm2.#", "evt.kvm1.x", false),
    ])
    func topicPatterns(_ pattern: String, _ key: String, _ expected: Bool) async throws {
        let bus = InProcessBus()
        try await bus.declare(
            Topology(
                exchanges: [.init(name: "t", kind: .topic)], queues: [.init(name: "q")],
                bindings: [.init(queue: "q", exchange: "t", routingKey: pattern)]))
        let routed = (try? await bus.publish(Message(exchange: "t", routingKey: key, body: []))) != nil
        #expect(routed == expected)
    }
}
