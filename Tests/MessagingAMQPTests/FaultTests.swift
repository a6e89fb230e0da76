import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import Synchronization
import TestKit
import Testing

extension RabbitMQ {
    /// Brokers that restart, networks that fail, queues that vanish.
    @Suite struct Faults {}
}

/// Publishes numbered messages without pause, again until they are confirmed, and keeps those that were.
private func publishSteadily(_ bus: AMQPBus, _ names: Names, until stop: StopFlag) async -> Set<String> {
    var confirmed: Set<String> = []
    var number = 0
    while !stop.isSet {
        var message = Message(exchange: names.tasks, routingKey: "kvm1", body: [])
        message.messageID = "\(number)"
        if (try? await bus.publish(message)) != nil {
            confirmed.insert(message.messageID)
            number += 1
        }
    }
    return confirmed
}

final class Seen: Sendable {
    private let state = Mutex<Set<String>>([])
    var ids: Set<String> { state.withLock { $0 } }
    var count: Int { state.withLock { $0.count } }

    /// Acks what comes and keeps it, until the subscription ends.
    func consume(_ subscription: Subscription) async {
        for await delivery in subscription.deliveries {
            state.withLock { _ = $0.insert(delivery.message.messageID) }
            await delivery.settle(.ack)
        }
    }
}

extension RabbitMQ.Faults {
    func message(_ names: Names, _ id: String = "") -> Message {
        var message = Message(exchange: names.tasks, routingKey: "kvm1", body: [])
        message.messageID = id
        return message
    }

    /// Publishing and consuming go on across `disturb`; nothing that was confirmed is lost.
    private func expectNoLoss(
        _ configuration: AMQPConfiguration, _ disturb: @Sendable (AMQPBus) async throws -> Void
    ) async throws {
        let names = Broker.names()
        try await withBus(configuration) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 20)
            let seen = Seen()
            let consuming = Task { await seen.consume(subscription) }
            let stop = StopFlag()
            async let publishing = publishSteadily(bus, names, until: stop)
            let before = try await eventually { seen.count > 100 ? seen.count : nil }
            #expect(before != nil)
            try await disturb(bus)
            let reached = seen.count
            let after = try await eventually(within: .seconds(30)) { seen.count > reached + 100 ? true : nil }
            #expect(after == true, "\(bus.status.problems)")
            stop.set()
            let confirmed = await publishing
            let all = try await eventually { seen.ids.isSuperset(of: confirmed) ? true : nil }
            #expect(all == true, "lost: \(confirmed.subtracting(seen.ids))")
            #expect(bus.status.isHealthy, "\(bus.status.problems)")
            subscription.cancel()
            await consuming.value
        }
    }

    @Test func brokerRestartsLoseNothingConfirmed() async throws {
        let broker = try Broker.current
        try await expectNoLoss(broker.configuration()) { bus in
            // In this order: RabbitMQ 3.10 forgets a quorum queue whose node is killed seconds after its declaration.
            for how in ["stop", "kill"] {
                try await broker.control(how)
                let noticed = try await eventually { bus.status.isHealthy ? nil : bus.status }
                #expect(noticed?.consumers.first?.isActive == false)
                try await broker.control("start")
                let back = try await eventually(within: .seconds(20)) { bus.status.isHealthy ? true : nil }
                #expect(back == true, "\(bus.status.problems)")
            }
        }
    }

    @Test(.enabled(if: PrivateRabbitMQ.nodes > 1, "needs a cluster: FLOTILLA_TEST_BROKERS=3"))
    func lossOfAnyNodeLosesNothingConfirmed() async throws {
        let broker = try Broker.current
        try await expectNoLoss(broker.configuration()) { bus in
            for node in 1...broker.nodes.count {
                let sent = bus.status.connections.compactMap(\.lastInbound)
                try await broker.control("kill", node: node)
                let back = try await eventually(within: .seconds(20)) {
                    bus.status.isHealthy && bus.status.connections.compactMap(\.lastInbound) != sent ? true : nil
                }
                #expect(back == true, "without node \(node): \(bus.status.problems)")
                try await broker.control("start", node: node)
            }
        }
    }

    @Test func resetConnectionsLoseNothingConfirmed() async throws {
        let broker = try Broker.current
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        try await expectNoLoss(broker.configuration(ports: [proxy.port])) { bus in
            for _ in 0..<5 {
                let before = bus.status.connections
                proxy.reset()
                let again = try await eventually {
                    zip(bus.status.connections, before).allSatisfy { $0.state != $1.state && $0.isConnected }
                        ? true : nil
                }
                #expect(again == true)
            }
        }
    }

    @Test func everyChangeOfAConnectionIsReported() async throws {
        let broker = try Broker.current
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        let reports = Mutex<[String]>([])
        let bus = try AMQPBus(broker.configuration(ports: [proxy.port])) { connection in
            let state =
                switch connection.state {
                case .connected: "connected"
                case .connecting: "lost"
                case .blocked: "blocked"
                case .closed: "closed"
                }
            if connection.name == "publish" { reports.withLock { $0.append(state) } }
        }
        let made = try await eventually { bus.status.isHealthy ? true : nil }
        #expect(made == true)
        proxy.reset()
        let again = try await eventually { reports.withLock { $0.count } == 3 ? true : nil }
        #expect(again == true)
        await bus.close()
        #expect(reports.withLock { $0 } == ["connected", "lost", "connected", "closed"])
        #expect(
            try await code { try await bus.publish(Message(exchange: "", routingKey: "", body: [])) } == .unavailable)
        #expect(try await code { _ = try await bus.subscribe("q", prefetch: 1) } == .unavailable)
    }

    /// Whatever the moment at which the connection goes away: no call waits for ever, none is forgotten.
    @Test func callsDuringResetsAllEnd() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        try await withBus(broker.configuration()) { try await $0.declare(names.topology(hosts: ["kvm1"])) }
        var configuration = broker.configuration(ports: [proxy.port])
        configuration.backoff = Backoff(base: .milliseconds(10), limit: .milliseconds(20))
        try await withBus(configuration) { bus in
            let done = StopFlag()
            async let resets: Void = {
                while !done.isSet {
                    proxy.reset()
                    try? await Task.sleep(for: .milliseconds(Int.random(in: 50...300)))
                }
            }()
            let codes = await withTaskGroup(of: Set<MigrationError.Code?>.self) { group in
                for _ in 0..<8 {
                    group.addTask {
                        var codes: Set<MigrationError.Code?> = []
                        for _ in 0..<10 {
                            _ = try? codes.insert(
                                await code {
                                    let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 5)
                                    defer { subscription.cancel() }
                                    try await bus.publish(message(names))
                                    var iterator = subscription.deliveries.makeAsyncIterator()
                                    await iterator.next(isolation: #isolation)?.settle(.ack)
                                })
                        }
                        return codes
                    }
                }
                return await group.reduce(into: Set()) { $0.formUnion($1) }
            }
            done.set()
            await resets
            #expect(codes.isSubset(of: [nil, .unavailable]), "\(codes)")
            let healthy = try await eventually { bus.status.isHealthy ? true : nil }
            #expect(healthy == true)
            #expect(bus.status.consumers.isEmpty)
        }
    }

    @Test func closingSendsWhatWasPublishedAndSettled() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        let queue = names.tasks(of: "kvm1")
        try await withBus(broker.configuration()) { other in
            try await other.declare(names.topology(hosts: ["kvm1"]))
            for number in 0..<20 { try await other.publish(message(names, "\(number)")) }
            let bus = try AMQPBus(broker.configuration())
            let subscription = try await bus.subscribe(queue, prefetch: 20)
            var iterator = subscription.deliveries.makeAsyncIterator()
            var deliveries: [Delivery] = []
            while deliveries.count < 20 { deliveries.append(try await iterator.delivery()) }
            for delivery in deliveries { await delivery.settle(.ack) }
            async let published: Void = bus.publish(message(names, "last"))
            await bus.close()
            #expect(await iterator.next() == nil)
            // Published in time or refused, but not lost.
            let isPublished = (try? await published) != nil
            let depth = try await other.depth(of: queue)
            #expect(depth == QueueDepth(ready: isPublished ? 1 : 0, consumers: 0))
        }
    }

    @Test func closedBusesLeaveNothingBehind() async throws {
        let broker = try Broker.current
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        /// Sockets and event counters, and threads of buses.
        func held() throws -> [Int] {
            let threads = try Files.list("/proc/self/task").filter { thread in
                ((try? Files.read("/proc/self/task/\(thread)/comm")) ?? []).starts(with: Array("amqp".utf8))
            }
            return [try Files.list("/proc/self/fd").count, threads.count]
        }
        let before = try held()
        for _ in 0..<5 {
            try await withBus(broker.configuration(ports: [proxy.port])) { bus in
                for _ in 0..<3 {
                    let made = try await eventually { bus.status.isHealthy ? true : nil }
                    #expect(made == true)
                    let connections = bus.status.connections.map(\.state)
                    proxy.reset()
                    let lost = try await eventually { bus.status.connections.map(\.state) != connections ? true : nil }
                    #expect(lost == true)
                }
                _ = try await bus.depths(of: ["no.queue"])
            }
        }
        let after = try await eventually { try held() == before ? before : nil }
        #expect(after == before)
    }

    /// Neither side closes, no packet comes: only heartbeats tell.
    @Test func silentNetworkIsNoticedWithinTwoHeartbeats() async throws {
        let broker = try Broker.current
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        var configuration = broker.configuration(ports: [proxy.port])
        configuration.heartbeat = .seconds(1)
        try await expectNoLoss(configuration) { bus in
            proxy.set(.stall)
            let started = ContinuousClock.now
            let noticed = try await eventually {
                bus.status.connections.allSatisfy { !$0.isConnected } ? true : nil
            }
            #expect(noticed == true)
            #expect(ContinuousClock.now - started < .milliseconds(2600))
            // Those that were stalled stay so for ever.
            proxy.reset()
            proxy.set(.forward)
        }
    }

    /// A peer that does not read stops the thread in its send; publishing must fail in time and closing must end all
    /// the same.
    @Test func brokerThatDoesNotReadHoldsNobodyUp() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        let proxy = try ChaosProxy(to: broker.nodes[0].port)
        defer { proxy.stop() }
        var configuration = broker.configuration(ports: [proxy.port])
        // Longer than all else here: nothing but TCP's own timeout, or closing, ends the send.
        configuration.heartbeat = .seconds(60)
        configuration.publishTimeout = .seconds(2)
        let direct = try AMQPBus(broker.configuration())
        try await direct.declare(names.topology(hosts: ["kvm1"]))
        await direct.close()
        let bus = try AMQPBus(configuration)
        try await bus.publish(message(names))
        for isClosing in [false, true] {
            let connected = try await eventually { bus.status.connections[0].isConnected ? true : nil }
            #expect(connected == true)
            proxy.set(.stall)
            var large = message(names)
            large.body = [UInt8](repeating: 0, count: Message.maximumBody)
            let started = ContinuousClock.now
            async let codes = withTaskGroup(of: MigrationError.Code?.self) { [large] group in
                for _ in 0..<16 { group.addTask { try? await code { try await bus.publish(large) } } }
                return await group.reduce(into: Set()) { $0.insert($1) }
            }
            if isClosing { await bus.close(grace: .milliseconds(100)) }
            #expect(await codes == [.unavailable])
            #expect(ContinuousClock.now - started < .seconds(isClosing ? 4 : 10))
            proxy.reset()
            proxy.set(.forward)
        }
    }
}

extension BusStatus.Connection {
    fileprivate var isConnected: Bool { if case .connected = state { true } else { false } }
}
