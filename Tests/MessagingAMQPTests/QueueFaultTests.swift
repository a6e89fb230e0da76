import Messaging
import MessagingAMQP
import MigrationModel
import TestKit
import Testing

/// What the broker does to publishers and consumers while the connection is fine.
extension RabbitMQ.Faults {
    @Test func alarmHoldsPublishersBackAndShows() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        var configuration = broker.configuration()
        configuration.publishTimeout = .seconds(60)
        try await withBus(configuration) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            try await broker.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
            async let publishing: Void = bus.publish(message(names))
            let reason = try await eventually(within: .seconds(20)) {
                if case .blocked(_, let reason) = bus.status.connections[0].state { reason } else { nil }
            }
            #expect(reason?.contains("memory") == true)
            #expect(!bus.status.isHealthy)
            // Consuming goes on meanwhile.
            let events = try await bus.subscribe(names.coordinatorEvents, prefetch: 1)
            events.cancel()
            try await broker.ctl("set_vm_memory_high_watermark", "0.4")
            try await publishing
            #expect(bus.status.isHealthy)
        }
    }

    @Test func fullQueueRefuses() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        try await withBus(broker.configuration()) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            try await broker.ctl(
                "set_policy", "full", "^\(names.tasks(of: "kvm1"))$", #"{"max-length":2}"#, "--apply-to", "queues")
            let refused = try await eventually { () -> MigrationError.Code? in
                try await code { try await bus.publish(message(names)) }
            }
            #expect(refused == .resourceExhausted)
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 10)
            let seen = Seen()
            let consuming = Task { await seen.consume(subscription) }
            let accepted = try await eventually {
                try await code { try await bus.publish(message(names)) } == nil ? true : nil
            }
            #expect(accepted == true)
            subscription.cancel()
            await consuming.value
            try await broker.ctl("clear_policy", "full")
        }
    }

    @Test func consumerOfADeletedQueueComesBackWithIt() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        try await withBus(broker.configuration()) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            let other = try await bus.subscribe(names.coordinatorEvents, prefetch: 1)
            try await broker.ctl("delete_queue", names.tasks(of: "kvm1"))
            let problem = try await eventually { bus.status.consumers.first { !$0.isActive }?.problem }
            #expect(problem != nil)
            #expect(bus.status.consumers.filter(\.isActive).map(\.queue) == [names.coordinatorEvents])
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let back = try await eventually { bus.status.isHealthy ? true : nil }
            #expect(back == true)
            try await bus.publish(message(names, "after"))
            var iterator = subscription.deliveries.makeAsyncIterator()
            #expect(try await iterator.delivery().message.messageID == "after")
            other.cancel()
        }
    }

    @Test func whatIsHeldShowsUntilItIsSettledOrItsChannelLost() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        try await withBus(broker.configuration()) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 10)
            var iterator = subscription.deliveries.makeAsyncIterator()
            var held: BusStatus.Held? { bus.status.consumers[0].held }
            #expect(held == nil)
            var task = message(names, "m-convert-1")
            task.correlationID = "m-convert"
            try await bus.publish(task)
            let first = try await iterator.delivery()
            try await bus.publish(message(names, "later"))
            let second = try await iterator.delivery()
            // The oldest, and for longer and longer.
            let before = try #require(held)
            #expect(before.name == "task m-convert")
            #expect(try #require(held).duration > before.duration)
            await first.settle(.ack)
            #expect(held?.name == "message later")
            try await broker.ctl("delete_queue", names.tasks(of: "kvm1"))
            let isGone = try await eventually { bus.status.consumers[0].held == nil ? true : nil }
            #expect(isGone == true)
            await second.settle(.ack)
        }
    }

    /// RabbitMQ ends the channel of a consumer that settles nothing for too long (30 minutes by default).
    @Test func consumerTimeoutRedelivers() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        func set(timeout: Int, tick: Int) async throws {
            try await broker.ctl(
                "eval",
                "[rpc:multicall(application, set_env, [rabbit, Key, Value]) || "
                    + "{Key, Value} <- [{consumer_timeout, \(timeout)}, {channel_tick_interval, \(tick)}]].")
        }
        try await set(timeout: 300, tick: 100)
        try await withBus(broker.configuration()) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            try await bus.publish(message(names, "slow"))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var iterator = subscription.deliveries.makeAsyncIterator()
            let late = try await iterator.delivery()
            #expect(late.redeliveries == 0)
            let again = try await iterator.delivery()
            #expect(again.redeliveries == 1)
            // Of the channel that is gone: must not settle, nor end, anything on the new one.
            await late.settle(.ack)
            await again.settle(.ack)
            let empty = try await eventually {
                let depth = try await bus.depth(of: names.tasks(of: "kvm1"))
                return depth == QueueDepth(ready: 0, consumers: 1) ? true : nil
            }
            #expect(empty == true)
        }
        try await set(timeout: 1_800_000, tick: 60_000)
    }
}
