import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import Synchronization
import TestKit
import Testing

/// The buses that there are.
enum Kind: CaseIterable { case inProcess, rabbitMQ }

/// Everything that needs a broker shares one.
@Suite(.serialized, .timeLimit(.minutes(2)), PrivateRabbitMQ()) struct RabbitMQ {}

extension RabbitMQ {
    /// What every bus must do. Each test gets names of its own and one topology under them.
    @Suite struct Conformance {}
}

extension RabbitMQ.Conformance {
    private func with(
        _ kind: Kind, _ body: @Sendable (any MessageBus, Names) async throws -> Void
    ) async throws {
        let names = Broker.names()
        let topology = names.topology(hosts: ["kvm1", "kvm2"])
        switch kind {
        case .inProcess:
            let bus = InProcessBus()
            try await bus.declare(topology)
            try await body(bus, names)
        case .rabbitMQ:
            try await withBus(try Broker.current.tlsConfiguration("coordinator")) { bus in
                try await bus.declare(topology)
                try await body(bus, names)
            }
        }
    }

    private func task(_ names: Names, _ host: String, _ id: String) -> Message {
        var message = Message(exchange: names.tasks, routingKey: host, body: Array(id.utf8))
        message.messageID = id
        return message
    }

    @Test(arguments: Kind.allCases) func routesByHostInOrder(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            for id in ["a", "b", "c"] { try await bus.publish(task(names, "kvm1", id)) }
            try await bus.publish(task(names, "kvm2", "other"))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 10)
            var iterator = subscription.deliveries.makeAsyncIterator()
            for id in ["a", "b", "c"] {
                let delivery = try await iterator.delivery()
                #expect(delivery.message.messageID == id)
                #expect(delivery.redeliveries == 0)
                await delivery.settle(.ack)
            }
            subscription.cancel()
            #expect(await iterator.next() == nil)
        }
    }

    @Test(arguments: Kind.allCases) func unroutableMessageIsAnErrorNotALoss(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            await #expect { try await bus.publish(task(names, "kvm9", "x")) } throws: {
                ($0 as? MigrationError)?.code == .notFound
            }
        }
    }

    @Test(arguments: Kind.allCases) func oversizedMessageIsRefused(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            let message = Message(
                exchange: names.tasks, routingKey: "kvm1", body: [UInt8](repeating: 0, count: Message.maximumBody + 1))
            await #expect { try await bus.publish(message) } throws: {
                ($0 as? MigrationError)?.code == .resourceExhausted
            }
        }
    }

    @Test(arguments: Kind.allCases) func prefetchLimitsWhatIsUnsettled(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            for id in ["a", "b", "c"] { try await bus.publish(task(names, "kvm1", id)) }
            let one = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            let two = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var (first, second) = (one.deliveries.makeAsyncIterator(), two.deliveries.makeAsyncIterator())
            let (a, b) = (try await first.delivery(), try await second.delivery())
            #expect(Set([a.message.messageID, b.message.messageID]) == ["a", "b"])
            // Only a consumer with room gets the third.
            await b.settle(.ack)
            #expect(try await second.delivery().message.messageID == "c")
            await a.settle(.ack)
        }
    }

    @Test(arguments: Kind.allCases) func unsettledDeliveriesGoBackInOrderWhenTheConsumerEnds(_ kind: Kind) async throws
    {
        try await with(kind) { bus, names in
            for id in ["a", "b", "c"] { try await bus.publish(task(names, "kvm1", id)) }
            let dying = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 2)
            var iterator = dying.deliveries.makeAsyncIterator()
            let held = try await iterator.delivery()
            dying.cancel()
            let heir = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 3)
            var deliveries = heir.deliveries.makeAsyncIterator()
            var seen: [String: Int] = [:]
            for _ in 0..<3 {
                let delivery = try await deliveries.delivery()
                seen[delivery.message.messageID] = delivery.redeliveries
                await delivery.settle(.ack)
            }
            #expect(seen == ["a": 1, "b": 1, "c": 0])
            // A settlement after the fact changes nothing.
            await held.settle(.requeue)
        }
    }

    @Test(arguments: Kind.allCases) func rejectedMessagesReachTheDeadLetters(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            try await bus.publish(task(names, "kvm1", "poison"))
            let tasks = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var iterator = tasks.deliveries.makeAsyncIterator()
            let delivery = try await iterator.delivery()
            await delivery.settle(.reject(reason: "undecodable"))
            await delivery.settle(.requeue)
            let dead = try await bus.subscribe(names.dead, prefetch: 1)
            var letters = dead.deliveries.makeAsyncIterator()
            let letter = try await letters.delivery().message
            #expect(letter.messageID == "poison")
            #expect(letter.headers[Message.Death.reason] == .string(Message.Death.rejected))
            #expect(letter.headers[Message.Death.queue] == .string(names.tasks(of: "kvm1")))
            #expect(letter.headers[Message.Death.exchange] == .string(names.tasks))
            let died = try #require(letter.headers[Message.Death.time]?.integer)
            #expect(abs(Moment.now.milliseconds - died) < 60_000)
            #expect(letter.routingKey == "kvm1")
        }
    }

    @Test(arguments: Kind.allCases) func deliveryLimitIsABackstop(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            try await bus.publish(task(names, "kvm1", "again"))
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
            let letter = try await letters.delivery().message
            #expect(letter.messageID == "again")
            #expect(letter.headers[Message.Death.reason] == .string(Message.Death.deliveryLimit))
            tasks.cancel()
            #expect(await consumer.value == Names.deliveryLimit + 1)
        }
    }

    @Test(
        arguments: Kind.allCases,
        [
            ("evt.#", "evt.kvm1.ended", true), ("evt.*.ended", "evt.kvm1.ended", true),
            ("evt.*", "evt.kvm1.ended", false), ("#", "", true), ("evt.kvm1.#", "evt.kvm1", true),
            ("evt.kvm2.#", "evt.kvm1.x", false),
        ])
    func topicPatterns(_ kind: Kind, _ route: (pattern: String, key: String, arrives: Bool)) async throws {
        try await with(kind) { bus, names in
            let (exchange, queue) = ("\(names.namespace).topic", "\(names.namespace).queue")
            try await bus.declare(
                Topology(
                    exchanges: [.init(name: exchange, kind: .topic)], queues: [.init(name: queue)],
                    bindings: [.init(queue: queue, exchange: exchange, routingKey: route.pattern)]))
            let failure = try await code {
                try await bus.publish(Message(exchange: exchange, routingKey: route.key, body: []))
            }
            #expect(failure == (route.arrives ? nil : .notFound))
        }
    }

    @Test(arguments: Kind.allCases) func contentArrivesAsItWasSent(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            var message = task(names, "kvm1", "id-1")
            message.type = "/flotilla.v1.ConvertService/Convert"
            message.contentType = "application/grpc+proto"
            message.correlationID = "task-ü"
            message.headers = [
                "text": .string("naïve – ✓"), "empty": .string(""), "number": .integer(.min), "zero": .integer(0),
                "bytes-bin": .bytes([0, 255, 128]), "no-bytes": .bytes([]),
            ]
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 10)
            var iterator = subscription.deliveries.makeAsyncIterator()
            for size in [0, 1, 200_000, Message.maximumBody] {
                message.body = (0..<size).map { UInt8(truncatingIfNeeded: $0 &* 31) }
                try await bus.publish(message)
                let delivery = try await iterator.delivery()
                var received = delivery.message
                let sentAt = try #require(received.sentAt)
                #expect(abs(sentAt.milliseconds - Moment.now.milliseconds) < 60_000)
                received.sentAt = nil
                #expect(received == message)
                await delivery.settle(.ack)
            }
        }
    }

    @Test(arguments: Kind.allCases) func requeuedMessagesComeAgainAndCount(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            try await bus.publish(task(names, "kvm1", "a"))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var iterator = subscription.deliveries.makeAsyncIterator()
            for count in 0..<3 {
                let delivery = try await iterator.delivery()
                #expect(delivery.redeliveries == count)
                await delivery.settle(count < 2 ? .requeue : .ack)
            }
            let depth = try await eventually {
                try await bus.depth(of: names.tasks(of: "kvm1")).ready == 0 ? true : nil
            }
            #expect(depth == true)
        }
    }

    @Test(arguments: Kind.allCases) func whatDoesNotExistIsNotFound(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            #expect(try await code { _ = try await bus.subscribe("no.queue", prefetch: 1) } == .notFound)
            #expect(try await code { _ = try await bus.depth(of: "no.queue") } == .notFound)
            #expect(try await code { _ = try await bus.peek("no.queue", limit: 1) } == .notFound)
            let depths = try await bus.depths(of: ["no.queue", names.dead, "nor.this", names.coordinatorEvents])
            #expect(depths.keys.sorted() == [names.dead, names.coordinatorEvents].sorted())
            let message = Message(exchange: "no.exchange", routingKey: "", body: [])
            #expect(try await code { try await bus.publish(message) } == .notFound)
            // And nothing else suffers from it.
            try await bus.publish(task(names, "kvm1", "a"))
        }
    }

    @Test(arguments: Kind.allCases) func lookingAtAQueueTakesNothingFromIt(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            let queue = names.tasks(of: "kvm1")
            #expect(try await bus.depth(of: queue) == QueueDepth(ready: 0, consumers: 0))
            #expect(try await bus.peek(queue, limit: 5) == [])
            for id in ["a", "b", "c"] { try await bus.publish(task(names, "kvm1", id)) }
            #expect(try await bus.peek(queue, limit: 2).map(\.messageID) == ["a", "b"])
            let back = try await eventually { try await bus.depth(of: queue).ready == 3 ? true : nil }
            #expect(back == true)
            #expect(try await bus.peek(queue, limit: 5).map(\.messageID) == ["a", "b", "c"])
            let subscription = try await bus.subscribe(queue, prefetch: 2)
            var iterator = subscription.deliveries.makeAsyncIterator()
            _ = try await iterator.delivery()
            #expect(bus.status.isHealthy)
            #expect(bus.status.consumers.map(\.queue) == [queue])
            subscription.cancel()
            #expect(bus.status.consumers == [])
        }
    }

    /// What is left stays in the queue, also where looking ends by an error. A quorum queue puts what comes back behind what
    /// came back before.
    @Test(arguments: Kind.allCases) func lookingThroughAQueueTakesWhatIsWanted(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            let queue = names.tasks(of: "kvm1")
            func look(limit: Int = 9, _ verdict: @escaping @Sendable (String) throws -> Verdict) async throws -> String
            {
                let seen = Mutex("")
                try? await bus.look(through: queue, limit: limit) { message in
                    seen.withLock { $0 += message.messageID }
                    return try verdict(message.messageID)
                }
                return seen.withLock { $0 }
            }
            func left(_ count: Int) async throws -> String? {
                _ = try await eventually { try await bus.depth(of: queue).ready == count ? true : nil }
                return try await String(look { _ in .leave }.sorted())
            }
            for id in ["a", "b", "c", "d", "e"] { try await bus.publish(task(names, "kvm1", id)) }
            let first = try await look(limit: 2) { _ in .leave }
            #expect(first == "ab")
            #expect(try await left(5) == "abcde")
            let wanted = try await look { $0 == "b" ? .take : $0 == "d" ? .takeAsLast : .leave }
            #expect(wanted == "abcd")
            #expect(try await left(3) == "ace")
            let last = try await look { id in
                if id == "c" { throw MigrationError(.internal, "a test") }
                return id == "a" ? .take : .leave
            }
            #expect(last.contains("a") && last.last == "c")
            #expect(try await left(2) == "ce")
        }
    }

    @Test(arguments: Kind.allCases) func manyAtOnceArriveOnceEach(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            let count = 2000
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 50)
            async let seen = {
                var seen: [String] = []
                var iterator = subscription.deliveries.makeAsyncIterator()
                while seen.count < count, let delivery = await iterator.next() {
                    seen.append(delivery.message.messageID)
                    await delivery.settle(.ack)
                }
                return seen
            }()
            try await withThrowingTaskGroup(of: Void.self) { group in
                for number in 0..<count {
                    group.addTask { try await bus.publish(task(names, "kvm1", "\(number)")) }
                }
                try await group.waitForAll()
            }
            let ids = await seen
            #expect(ids.count == count)
            #expect(Set(ids).count == count)
        }
    }

    @Test(arguments: Kind.allCases) func declaringAgainChangesNothing(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            try await bus.publish(task(names, "kvm1", "a"))
            try await bus.declare(names.topology(hosts: ["kvm1", "kvm3"]))
            #expect(try await bus.depth(of: names.tasks(of: "kvm1")).ready == 1)
            try await bus.publish(task(names, "kvm3", "b"))
            // One message, not one for each time the binding was made.
            #expect(try await bus.depth(of: names.tasks(of: "kvm3")).ready == 1)
        }
    }

    /// Settlements in any order and of every kind reach the deliveries they are meant for.
    @Test(arguments: Kind.allCases) func mixedSettlementsTouchOnlyTheirOwn(_ kind: Kind) async throws {
        try await with(kind) { bus, names in
            let queue = names.tasks(of: "kvm1")
            for number in 0..<60 { try await bus.publish(task(names, "kvm1", "\(number)")) }
            let subscription = try await bus.subscribe(queue, prefetch: 60)
            var iterator = subscription.deliveries.makeAsyncIterator()
            var held: [Int: Delivery] = [:]
            while held.count < 60 {
                let delivery = try await iterator.delivery()
                held[try #require(Int(delivery.message.messageID))] = delivery
            }
            for (number, delivery) in held.shuffled() where number % 5 != 4 {
                await delivery.settle(number % 5 == 3 ? .reject(reason: "test") : .ack)
            }
            let letters = try await bus.subscribe(names.dead, prefetch: 60)
            var dead = letters.deliveries.makeAsyncIterator()
            var rejected: Set<String> = []
            while rejected.count < 12 { rejected.insert(try await dead.delivery().message.messageID) }
            #expect(rejected == Set((0..<60).filter { $0 % 5 == 3 }.map(String.init)))
            subscription.cancel()
            let left = try await eventually { try await bus.depth(of: queue).ready == 12 ? true : nil }
            #expect(left == true)
            let ids = try await bus.peek(queue, limit: 60).map(\.messageID)
            #expect(Set(ids) == Set((0..<60).filter { $0 % 5 == 4 }.map(String.init)))
        }
    }
}
