import HostKit
package import Messaging
import MigrationModel
import Synchronization

/// The bus over RabbitMQ: one connection for publishing and one for consuming, each with a thread of its own, since the
/// broker stops reading from a connection that publishes too much and with it from the settlements on it.
///
/// Connects by itself, and again whenever it must, until `close` is called; a bus that is not closed is never freed.
package final class AMQPBus: MessageBus {
    package var isDurable: Bool { true }

    private let configuration: AMQPConfiguration
    private let publishes: Inbox<PendingPublish>
    private let consumes: Inbox<ConsumeRequest>
    private let publishing: Link
    private let consuming: Link

    private struct State {
        var consumers: [ObjectIdentifier: Consumer] = [:]
        var isClosed = false
    }

    private let state = Mutex(State())

    /// Returns at once; `status` tells how connecting goes. Throws for a configuration that can't work.
    ///
    /// - Parameter onChange: is told whenever a connection is made, lost, blocked or closed; on the connection's own
    ///   thread, which waits for it.
    package init(
        _ configuration: AMQPConfiguration, onChange: @escaping @Sendable (BusStatus.Connection) -> Void = { _ in }
    ) throws {
        try configuration.validate()
        self.configuration = configuration
        let (publishWakeup, consumeWakeup) = (try Wakeup(), try Wakeup())
        let (publishes, consumes) = (Inbox<PendingPublish>(publishWakeup), Inbox<ConsumeRequest>(consumeWakeup))
        self.publishes = publishes
        self.consumes = consumes
        publishing = Link("publish", configuration, publishWakeup, onChange) { PublishRole(publishes, configuration) }
        consuming = Link("consume", configuration, consumeWakeup, onChange) { ConsumeRole(consumes, configuration) }
    }

    package var status: BusStatus {
        BusStatus(
            connections: [publishing.status, consuming.status],
            consumers: state.withLock { Array($0.consumers.values) }.map(\.status).sorted { $0.queue < $1.queue })
    }

    package func declare(_ topology: Topology) async throws {
        try await administer { try $0.declare(topology) }
    }

    package func publish(_ message: Message) async throws {
        try message.validateForAMQP()
        let publish = PendingPublish(message, deadline: .now + configuration.publishTimeout)
        try requireOpen { publishes.add(publish) }
        try await publish.waiter.wait()
    }

    package func subscribe(_ queue: String, prefetch: Int) async throws -> Subscription {
        let consumer = Consumer(queue, prefetch: prefetch, deadline: .now + configuration.publishTimeout)
        try requireOpen { consumes.add(.subscribe(consumer)) }
        do { try await consumer.started.wait() } catch {
            consumes.add(.cancel(consumer))
            throw error
        }
        state.withLock { $0.consumers[ObjectIdentifier(consumer)] = consumer }
        return Subscription(deliveries: consumer.mailbox.deliveries) { [self] in
            state.withLock { $0.consumers[ObjectIdentifier(consumer)] = nil }
            consumer.mailbox.finish()
            consumes.add(.cancel(consumer))
        }
    }

    package func depths(of queues: [String]) async throws -> [String: QueueDepth] {
        try await administer { try $0.depths(of: queues) }
    }

    /// Throws `permissionDenied` where this user may not read the queue. No message of it is delivered.
    package func requireReadable(_ queue: String) async throws {
        try await administer { try $0.requireReadable(queue) }
    }

    package func look(
        through queue: String, limit: Int, _ body: @escaping @Sendable (Message) async throws -> Verdict
    ) async throws {
        let stop = StopFlag()
        try await withTaskCancellationHandler {
            try await administer { [timeout = configuration.requestTimeout] in
                try $0.look(through: queue, limit: limit, within: timeout, stop, body)
            }
        } onCancel: {
            stop.set()
        }
    }

    /// Waits for the confirms of what has been published, settles what has been settled, ends all subscriptions and
    /// disconnects, within `grace` or a little more. What is published from now on fails with `unavailable`.
    package func close(grace: Duration = .seconds(5)) async {
        let isFirst = state.withLock { state in
            defer { state.isClosed = true }
            return !state.isClosed
        }
        guard isFirst else { return }
        async let consumed: Void = consuming.close(grace: grace)
        async let published: Void = publishing.close(grace: grace)
        _ = await (consumed, published)
    }

    private func administer<Value: Sendable>(
        _ body: @escaping @Sendable (Administration) throws -> Value
    ) async throws -> Value {
        try requireOpen {}
        return try await Administration.run(configuration, body)
    }

    /// Adds nothing to an inbox that nobody empties any more.
    private func requireOpen(_ body: () -> Void) throws {
        try state.withLock { state in
            guard !state.isClosed else { throw MigrationError(.unavailable, "the bus is closed") }
            body()
        }
    }
}
