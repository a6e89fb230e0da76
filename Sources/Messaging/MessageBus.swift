package import MigrationModel
import Synchronization

/// A message as AMQP 0-9-1 knows it, with the properties this project uses. `protocol/amqp.md` says what goes where.
package struct Message: Sendable, Equatable {
    package var exchange: String
    package var routingKey: String
    /// Property `type`: the gRPC method, or the kind of event.
    package var type = ""
    /// Property `content-type`.
    package var contentType = ""
    /// Property `correlation-id`: the task.
    package var correlationID = ""
    /// Property `message-id`: the idempotency key.
    package var messageID = ""
    /// Property `user-id`, verified by the broker.
    package var userID = ""
    /// Property `timestamp`, in whole seconds: set by the bus that takes the message.
    package var sentAt: Moment?
    package var headers: [String: HeaderValue] = [:]
    package var body: [UInt8]

    package init(exchange: String, routingKey: String, body: [UInt8]) {
        self.exchange = exchange
        self.routingKey = routingKey
        self.body = body
    }

    /// Larger bodies are refused by publishers. A larger one that got to a queue some other way is delivered, and seen
    /// by `peek`, without its body: header `omittedBodySize` holds its size, and `requireSize` throws.
    package static let maximumBody = 1 << 20
    package static let omittedBodySize = "x-omitted-body-size"

    /// In bytes, also of a body that was left out.
    package var bodySize: Int64 { headers[Self.omittedBodySize]?.integer ?? Int64(body.count) }

    /// Throws `invalidArgument` for a message whose body is over the limit.
    package func requireSize() throws {
        guard bodySize <= Self.maximumBody else {
            throw MigrationError(
                .invalidArgument, "its body has \(bodySize) bytes, \(Self.maximumBody) are allowed")
        }
    }

    /// Headers of a dead letter: the queue it was in, the exchange it was sent to, and why it died the first time,
    /// `Death.rejected` or `Death.deliveryLimit`, as brokers add them; and when, in milliseconds, which the bus makes of
    /// what they add. Exchange and queue of later deaths are not kept.
    package enum Death {
        package static let time = "x-first-death-unix-ms"
        package static let queue = "x-first-death-queue"
        package static let exchange = "x-first-death-exchange"
        package static let reason = "x-first-death-reason"

        package static let rejected = "rejected"
        package static let deliveryLimit = "delivery_limit"
    }
}

package enum HeaderValue: Sendable, Equatable {
    case string(String)
    case integer(Int64)
    case bytes([UInt8])

    package var string: String? { if case .string(let value) = self { value } else { nil } }
    package var integer: Int64? { if case .integer(let value) = self { value } else { nil } }
}

/// What becomes of a delivery.
package enum Settlement: Sendable, Equatable {
    case ack
    /// Back to the queue, for this consumer or another.
    case requeue
    /// To the dead-letter exchange. The message can't carry the reason: it is for the bus's log alone.
    case reject(reason: String)
}

package struct Delivery: Sendable {
    package var message: Message
    /// Times it was delivered before.
    package var redeliveries: Int
    private let settlement: @Sendable (Settlement) async -> Void

    package init(
        message: Message, redeliveries: Int, settlement: @escaping @Sendable (Settlement) async -> Void
    ) {
        self.message = message
        self.redeliveries = redeliveries
        self.settlement = settlement
    }

    /// Only the first settlement counts. A delivery that is never settled goes back when its subscription ends.
    package func settle(_ settlement: Settlement) async { await self.settlement(settlement) }
}

/// A running consumer. What it has not settled goes back to the queue when it is cancelled.
package struct Subscription: Sendable {
    package let deliveries: AsyncStream<Delivery>
    private let onCancel: @Sendable () -> Void

    package init(deliveries: AsyncStream<Delivery>, onCancel: @escaping @Sendable () -> Void) {
        self.deliveries = deliveries
        self.onCancel = onCancel
    }

    package func cancel() { onCancel() }
}

/// The seam between tasks and transports: RabbitMQ, or this process alone.
package protocol MessageBus: Sendable {
    /// Whether messages outlive this process. Where they don't, what was sent is gone after a restart and the store
    /// sends it again.
    var isDurable: Bool { get }

    /// How it fares now. A snapshot; asking costs next to nothing.
    var status: BusStatus { get }

    /// Makes exchanges, queues and bindings; those that exist stay. Throws `failedPrecondition` when one exists with
    /// other settings. Needs a broker user who may configure: a worker never calls it.
    func declare(_ topology: Topology) async throws

    /// Returns once the bus has taken responsibility for the message (persistent, mandatory, confirmed).
    ///
    /// Throws `notFound` when no queue takes it, `resourceExhausted` when it is too large or the queue is full,
    /// `permissionDenied` or `failedPrecondition` when the broker refuses it, `unavailable` when the broker could not
    /// be reached or did not answer in time. After `unavailable` or a cancellation the message may have arrived all
    /// the same: who sends it again must expect two.
    func publish(_ message: Message) async throws

    /// Consumes with at most `prefetch` unsettled deliveries. Throws `notFound` for an unknown queue.
    ///
    /// Lives until it is cancelled: when the connection or the queue goes away, it comes back with them, and what was
    /// not settled by then is delivered again.
    func subscribe(_ queue: String, prefetch: Int) async throws -> Subscription

    /// What these queues hold. One that does not exist is left out. Better asked for many at once: a broker is
    /// connected to for each call.
    func depths(of queues: [String]) async throws -> [String: QueueDepth]

    /// Shows a queue's first messages to `body`, oldest first, and holds one at a time; those counted as unsettled with a
    /// consumer are not seen. What `body` leaves stays in the queue, and so does the one for which it throws; a broker may put
    /// it behind others. For people who look at dead letters: it counts as a delivery, so not for queues with a low
    /// delivery limit.
    ///
    /// After an error a message that `body` has taken may be there all the same.
    func look(
        through queue: String, limit: Int, _ body: @escaping @Sendable (Message) async throws -> Verdict
    ) async throws
}

/// What becomes of a message that somebody looks at, and of those behind it.
package enum Verdict: Sendable {
    case leave, take
    /// And looks no further.
    case takeAsLast
}

extension MessageBus {
    /// Throws `notFound` for an unknown queue.
    package func depth(of queue: String) async throws -> QueueDepth {
        guard let depth = try await depths(of: [queue])[queue] else {
            throw MigrationError(.notFound, "queue \(queue) does not exist")
        }
        return depth
    }

    /// The first messages of a queue, all at once.
    package func peek(_ queue: String, limit: Int) async throws -> [Message] {
        let messages = Mutex<[Message]>([])
        try await look(through: queue, limit: limit) { message in
            messages.withLock { $0.append(message) }
            return .leave
        }
        return messages.withLock { $0 }
    }
}
