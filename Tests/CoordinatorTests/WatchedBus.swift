import Messaging
import MigrationModel
import Synchronization

/// Counts what is declared, keeps who publishes to one key waiting, and fares as it is told.
final class WatchedBus: MessageBus {
    private let bus = InProcessBus()
    private let stalled: String?
    private let strange: String?
    private let delay: Duration
    private let refusal: Mutex<(key: String, code: MigrationError.Code)?>
    private let seen = Mutex<[(key: String, id: String)]>([])
    private let subscribed = Mutex<[(queue: String, prefetch: Int)]>([])
    private let declared = Mutex<[String]>([])
    private let looked = Mutex<[String]>([])

    private let told = Mutex<(status: BusStatus, looks: Int)?>(nil)

    var isDurable: Bool { told.withLock { $0 } != nil }
    var status: BusStatus {
        told.withLock { told in
            told?.looks += 1
            return told?.status
        } ?? bus.status
    }

    /// How often somebody has looked at the status since it was set.
    var looks: Int { told.withLock { $0?.looks ?? 0 } }

    /// Outlives, from now on, the process as a broker does.
    func set(_ status: BusStatus) { told.withLock { $0 = (status, 0) } }

    func declarations(of queue: String) -> Int { declared.withLock { $0.count(where: { $0 == queue }) } }

    func declare(_ topology: Topology) async throws {
        if let strange, topology.queues.contains(where: { $0.name == strange }) {
            throw MigrationError(.failedPrecondition, "queue \(strange) is there with other arguments")
        }
        declared.withLock { $0 += topology.queues.map(\.name) }
        try await bus.declare(topology)
    }

    /// - Parameters:
    ///   - stalled: publishing with this routing key never ends.
    ///   - refused: publishing with this one fails, until `accept` is called.
    ///   - delay: before it fails.
    ///   - strange: a queue that somebody else made.
    init(
        stalled: String? = nil, refused: (key: String, code: MigrationError.Code)? = nil,
        after delay: Duration = .zero, strange: String? = nil
    ) {
        (self.stalled, self.delay, self.strange) = (stalled, delay, strange)
        refusal = Mutex(refused)
    }

    /// The ids of what was published with this key, whatever came of it.
    func published(_ key: String) -> [String] { seen.withLock { $0.filter { $0.key == key }.map(\.id) } }

    func accept() { refusal.withLock { $0 = nil } }

    /// How often somebody has looked through the queue to its end.
    func looks(through queue: String) -> Int { looked.withLock { $0.count(where: { $0 == queue }) } }

    /// Of a queue's subscriptions.
    func prefetches(of queue: String) -> [Int] {
        subscribed.withLock { $0.filter { $0.queue == queue }.map(\.prefetch) }
    }

    func publish(_ message: Messaging.Message) async throws {
        seen.withLock { $0.append((message.routingKey, message.messageID)) }
        if message.routingKey == stalled { try await Task.sleep(for: .seconds(3600)) }
        if let refusal = refusal.withLock({ $0 }), refusal.key == message.routingKey {
            try await Task.sleep(for: delay)
            throw MigrationError(refusal.code, "refused")
        }
        try await bus.publish(message)
    }

    func subscribe(_ queue: String, prefetch: Int) async throws -> Subscription {
        subscribed.withLock { $0.append((queue, prefetch)) }
        return try await bus.subscribe(queue, prefetch: prefetch)
    }

    func depths(of queues: [String]) async throws -> [String: QueueDepth] { try await bus.depths(of: queues) }

    func look(
        through queue: String, limit: Int, _ body: @escaping @Sendable (Messaging.Message) async throws -> Verdict
    ) async throws {
        try await bus.look(through: queue, limit: limit, body)
        looked.withLock { $0.append(queue) }
    }
}
