import HostKit
import MigrationModel
import Synchronization

/// The bus of one process: the same exchanges, prefetch, redelivery, delivery limit and dead-lettering as a broker,
/// in memory. Ships with `flotilla migrate`.
package final class InProcessBus: MessageBus {
    package var isDurable: Bool { false }

    private struct Stored {
        var message: Message
        var deliveries = 0
    }

    private struct Consumer {
        let id: Int
        let prefetch: Int
        let since: Moment
        let continuation: AsyncStream<Delivery>.Continuation
        var unsettled: [Int: Stored] = [:]
    }

    private struct QueueState {
        var settings: Topology.Queue
        var ready: [Stored] = []
        var consumers: [Consumer] = []
    }

    private struct State {
        var exchanges: [String: Topology.ExchangeKind] = [:]
        var queues: [String: QueueState] = [:]
        var bindings: [Topology.Binding] = []
        var nextID = 0
    }

    private let state = Mutex(State())

    package init() {}

    package func declare(_ topology: Topology) async throws {
        state.withLock { state in
            for exchange in topology.exchanges { state.exchanges[exchange.name] = exchange.kind }
            for queue in topology.queues where state.queues[queue.name] == nil {
                state.queues[queue.name] = QueueState(settings: queue)
            }
            for binding in topology.bindings where !state.bindings.contains(binding) {
                state.bindings.append(binding)
            }
        }
    }

    package func publish(_ message: Message) async throws {
        guard message.body.count <= Message.maximumBody else {
            throw MigrationError(
                .resourceExhausted,
                "message \(message.type) for \(message.correlationID) has \(message.body.count) bytes, "
                    + "\(Message.maximumBody) are allowed")
        }
        var message = message
        message.sentAt = .now.wholeSeconds
        let routed = state.withLock { [message] state in
            let queues = Self.route(message, &state)
            for queue in queues { dispatch(queue, &state) }
            return queues
        }
        guard !routed.isEmpty else {
            throw MigrationError(
                .notFound, "no queue takes messages of exchange \(message.exchange) with key \(message.routingKey)")
        }
    }

    package func subscribe(_ queue: String, prefetch: Int) async throws -> Subscription {
        let (stream, continuation) = AsyncStream<Delivery>.makeStream()
        let id = try state.withLock { state in
            guard state.queues[queue] != nil else { throw MigrationError(.notFound, "queue \(queue) does not exist") }
            state.nextID += 1
            state.queues[queue]?.consumers.append(
                Consumer(id: state.nextID, prefetch: max(prefetch, 1), since: .now, continuation: continuation))
            let id = state.nextID
            dispatch(queue, &state)
            return id
        }
        return Subscription(deliveries: stream) { [self] in cancel(consumer: id, of: queue) }
    }

    package var status: BusStatus {
        state.withLock { state in
            BusStatus(
                consumers: state.queues.values.flatMap { queue in
                    queue.consumers.map { .init(queue: queue.settings.name, activeSince: $0.since) }
                })
        }
    }

    package func depths(of queues: [String]) async throws -> [String: QueueDepth] {
        state.withLock { state in
            queues.reduce(into: [:]) { depths, name in
                depths[name] = state.queues[name].map {
                    QueueDepth(ready: $0.ready.count, consumers: $0.consumers.count)
                }
            }
        }
    }

    package func look(
        through queue: String, limit: Int, _ body: @escaping @Sendable (Message) async throws -> Verdict
    ) async throws {
        var ahead = try state.withLock { state in
            guard let ready = state.queues[queue]?.ready else {
                throw MigrationError(.notFound, "queue \(queue) does not exist")
            }
            state.queues[queue]?.ready.removeFirst(min(limit, ready.count))
            return ready.prefix(limit)
        }
        var left: [Stored] = []
        defer {
            state.withLock { state in
                state.queues[queue]?.ready.insert(contentsOf: left + ahead, at: 0)
                dispatch(queue, &state)
            }
        }
        while let next = ahead.first {
            let verdict = try await body(next.message)
            ahead.removeFirst()
            if verdict == .leave { left.append(next) }
            if verdict == .takeAsLast { break }
        }
    }

    private func cancel(consumer id: Int, of queue: String) {
        state.withLock { state in
            guard let index = state.queues[queue]?.consumers.firstIndex(where: { $0.id == id }),
                let consumer = state.queues[queue]?.consumers.remove(at: index)
            else { return }
            consumer.continuation.finish()
            for (_, stored) in consumer.unsettled.sorted(by: { $0.key > $1.key }) {
                state.queues[queue]?.ready.insert(stored, at: 0)
            }
            dispatch(queue, &state)
        }
    }

    /// Puts the message into every queue that a binding names, each once, and returns those.
    private static func route(_ message: Message, _ state: inout State) -> Set<String> {
        guard let kind = state.exchanges[message.exchange] else { return [] }
        let queues = Set(
            state.bindings.filter {
                $0.exchange == message.exchange && matches(kind, pattern: $0.routingKey, key: message.routingKey)
            }.map(\.queue))
        for queue in queues { state.queues[queue]?.ready.append(Stored(message: message)) }
        return queues
    }

    static func matches(_ kind: Topology.ExchangeKind, pattern: String, key: String) -> Bool {
        switch kind {
        case .fanout: return true
        case .direct: return pattern == key
        case .topic:
            return matches(pattern.split(separator: ".")[...], key.split(separator: ".")[...])
        }
    }

    /// `*` is one word, `#` any number of them.
    private static func matches(_ pattern: ArraySlice<Substring>, _ key: ArraySlice<Substring>) -> Bool {
        guard let first = pattern.first else { return key.isEmpty }
        if first == "#" {
            return matches(pattern.dropFirst(), key) || (!key.isEmpty && matches(pattern, key.dropFirst()))
        }
        guard let word = key.first, first == "*" || first == word else { return false }
        return matches(pattern.dropFirst(), key.dropFirst())
    }

    /// Hands ready messages to consumers with room, the least busy first.
    private func dispatch(_ name: String, _ state: inout State) {
        while let queue = state.queues[name], !queue.ready.isEmpty {
            guard
                let index = queue.consumers.indices
                    .filter({ queue.consumers[$0].unsettled.count < queue.consumers[$0].prefetch })
                    .min(by: { queue.consumers[$0].unsettled.count < queue.consumers[$1].unsettled.count }),
                var stored = state.queues[name]?.ready.removeFirst()
            else { return }
            stored.deliveries += 1
            state.nextID += 1
            let tag = state.nextID
            let consumer = queue.consumers[index]
            state.queues[name]?.consumers[index].unsettled[tag] = stored
            consumer.continuation.yield(
                Delivery(message: stored.message, redeliveries: stored.deliveries - 1) { [self] settlement in
                    settle(settlement, tag: tag, consumer: consumer.id, queue: name)
                })
        }
    }

    private func settle(_ settlement: Settlement, tag: Int, consumer id: Int, queue name: String) {
        state.withLock { state in
            guard let index = state.queues[name]?.consumers.firstIndex(where: { $0.id == id }),
                let stored = state.queues[name]?.consumers[index].unsettled.removeValue(forKey: tag)
            else { return }
            let limit = state.queues[name]?.settings.deliveryLimit
            var touched = [name]
            switch settlement {
            case .ack: break
            case .requeue where limit.map { stored.deliveries > $0 } ?? false:
                touched += deadLetter(stored, from: name, Message.Death.deliveryLimit, &state)
            case .requeue: state.queues[name]?.ready.insert(stored, at: 0)
            case .reject: touched += deadLetter(stored, from: name, Message.Death.rejected, &state)
            }
            for queue in touched { dispatch(queue, &state) }
        }
    }

    private func deadLetter(_ stored: Stored, from queue: String, _ reason: String, _ state: inout State) -> [String] {
        guard let exchange = state.queues[queue]?.settings.deadLetterExchange else { return [] }
        var message = stored.message
        if message.headers[Message.Death.reason] == nil {
            message.headers[Message.Death.reason] = .string(reason)
            message.headers[Message.Death.queue] = .string(queue)
            message.headers[Message.Death.time] = .integer(Moment.now.milliseconds)
            message.headers[Message.Death.exchange] = .string(message.exchange)
        }
        message.exchange = exchange
        return Array(Self.route(message, &state))
    }
}
