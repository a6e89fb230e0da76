import CRabbitMQ
import HostKit
package import Messaging
import MigrationModel

/// Rare requests that wait for their answer, each round on a connection of its own: what they can do to a channel
/// (a queue that does not exist closes it) touches nothing else. Blocks its thread.
struct Administration {
    private static let channel: UInt16 = 1
    private let connection: Connection

    static func run<Value: Sendable>(
        _ configuration: AMQPConfiguration, _ body: @escaping @Sendable (Administration) throws -> Value
    ) async throws -> Value {
        try await blocking("amqp admin", stack: Link.stack) {
            var failure: (any Error)?
            for broker in configuration.brokers.shuffled() {
                let administration: Administration
                do { administration = try Administration(broker, configuration) } catch {
                    failure = error
                    continue
                }
                defer { administration.connection.close() }
                return try body(administration)
            }
            throw failure ?? MigrationError(.internal, "no broker is configured")
        }
    }

    private init(_ broker: AMQPConfiguration.Broker, _ configuration: AMQPConfiguration) throws {
        connection = try Connection(to: broker, configuration, name: "admin")
        _ = try connection.request { handle, _ in amqp_channel_open(handle, Self.channel) }
        try connection.acceptFrames(of: 4 << 20)
    }

    func declare(_ topology: Topology) throws {
        for exchange in topology.exchanges {
            _ = try connection.request { handle, encoder in
                amqp_exchange_declare(
                    handle, Self.channel, encoder.bytes(exchange.name), encoder.bytes(exchange.kind.rawValue), 0, 1, 0,
                    0, amqp_empty_table)
            }
        }
        for queue in topology.queues {
            _ = try connection.request { handle, encoder in
                amqp_queue_declare(
                    handle, Self.channel, encoder.bytes(queue.name), 0, 1, 0, 0, encoder.table(queue.arguments))
            }
        }
        for binding in topology.bindings {
            _ = try connection.request { handle, encoder in
                amqp_queue_bind(
                    handle, Self.channel, encoder.bytes(binding.queue), encoder.bytes(binding.exchange),
                    encoder.bytes(binding.routingKey), amqp_empty_table)
            }
        }
    }

    func depths(of queues: [String]) throws -> [String: QueueDepth] {
        var depths: [String: QueueDepth] = [:]
        for queue in queues { depths[queue] = try depth(of: queue) }
        return depths
    }

    /// Nil for a queue that does not exist: the broker closes the channel over it, and the next takes its number.
    private func depth(of queue: String) throws -> QueueDepth? {
        do {
            let found = try connection.request { handle, encoder in
                amqp_queue_declare(handle, Self.channel, encoder.bytes(queue), 1, 0, 0, 0, amqp_empty_table)
            }
            return QueueDepth(ready: Int(found.message_count), consumers: Int(found.consumer_count))
        } catch let error as MigrationError where error.code == .notFound {
            try connection.confirmChannelClose(Self.channel)
            _ = try connection.request { handle, _ in amqp_channel_open(handle, Self.channel) }
            return nil
        }
    }

    /// Throws `permissionDenied` where this user may not read the queue. Delivers nothing: the broker asks for the
    /// permission first, and then refuses a consumer whose priority is no number.
    func requireReadable(_ queue: String) throws {
        do {
            _ = try connection.request { handle, encoder in
                amqp_basic_consume(
                    handle, Self.channel, encoder.bytes(queue), amqp_empty_bytes, 0, 0, 0,
                    encoder.table([("x-priority", .string("none"))]))
            }
        } catch let error as MigrationError where error.code == .failedPrecondition {}
    }

    /// Gets them one by one, and acknowledges none but those that `body` takes: the end of the connection puts the others
    /// back.
    func look(
        through queue: String, limit: Int, within timeout: Duration, _ stop: StopFlag,
        _ body: @escaping @Sendable (Message) async throws -> Verdict
    ) throws {
        guard try depth(of: queue) != nil else {
            throw MigrationError(.notFound, "queue \(queue) does not exist")
        }
        var verdict = Verdict.leave
        for _ in 0..<limit where verdict != .takeAsLast {
            try stop.check()
            guard let (tag, message) = try next(of: queue, within: timeout) else { break }
            verdict = try waiting { try await body(message) }
            if verdict != .leave { try connection.acknowledge(tag, isMultiple: false, channel: Self.channel) }
        }
        // An answer on the same channel: the broker has read the acknowledgements.
        _ = try depth(of: queue)
    }

    /// Nil of a queue with none.
    private func next(of queue: String, within timeout: Duration) throws -> (tag: UInt64, message: Message)? {
        try connection.get(queue, channel: Self.channel)
        var assembly = ContentAssembly()
        let end = ContinuousClock.now + timeout
        while true {
            guard let frame = try connection.receive(within: max(end - .now, .zero)) else {
                throw MigrationError(.unavailable, "broker \(connection.broker) does not answer")
            }
            switch frame {
            case .method(_, let method):
                switch method {
                case .got: assembly = ContentAssembly(method)
                case .gotNothing: return nil
                case .channelClose(let code, let text), .connectionClose(let code, let text):
                    throw Connection.refusal(code: code, text: text)
                default: break
                }
            case .header, .body:
                guard let content = assembly.add(frame), case .got(let tag, _, let exchange, let key) = content.method
                else { continue }
                return (tag, Message(content, exchange: exchange, routingKey: key))
            }
        }
    }
}

extension Topology.Queue {
    /// Of `queue.declare`: https://www.rabbitmq.com/docs/queues#optional-arguments
    package var arguments: [(String, HeaderValue)] {
        var arguments: [(String, HeaderValue)] = [("x-queue-type", .string("quorum"))]
        if let expires { arguments.append(("x-expires", .integer(expires.milliseconds))) }
        if let deliveryLimit { arguments.append(("x-delivery-limit", .integer(Int64(deliveryLimit)))) }
        if let deadLetterExchange {
            // A dead letter leaves the queue when the dead-letter queue has confirmed it, not before; RabbitMQ does so only
            // for queues that refuse what they have no room for.
            arguments += [
                ("x-dead-letter-exchange", .string(deadLetterExchange)),
                ("x-dead-letter-strategy", .string("at-least-once")), ("x-overflow", .string("reject-publish")),
            ]
        }
        return arguments
    }
}
