import CRabbitMQ
import HostKit
import Messaging
import MigrationModel

/// Consumes, each subscription on a channel of its own, so that what ends one (its queue deleted, the broker's consumer
/// timeout) leaves the others alone. A channel that ends is opened again after a while, for ever until the subscription
/// is cancelled.
final class ConsumeRole: LinkRole {
    /// RabbitMQ's frames are far smaller, except for the headers of dead letters.
    private static let largestFrame = 4 << 20

    private let inbox: Inbox<ConsumeRequest>
    private let configuration: AMQPConfiguration
    private var channels: [UInt16: ConsumerChannel] = [:]
    /// Channels that are being closed; their numbers are not free yet.
    private var closing: Set<UInt16> = []
    private var generation: UInt64 = 0

    init(_ inbox: Inbox<ConsumeRequest>, _ configuration: AMQPConfiguration) {
        self.inbox = inbox
        self.configuration = configuration
    }

    /// Nothing is ever waited for: settlements have no answer.
    var isIdle: Bool { true }

    func connected(_ connection: Connection) throws {
        try connection.acceptFrames(of: Self.largestFrame)
        for channel in channels.values { try open(channel, connection) }
    }

    func work(_ connection: Connection?) throws -> ContinuousClock.Instant? {
        var failure: (any Error)?
        for request in inbox.takeAll() {
            // When the connection fails halfway, those after it must still be known to the next.
            do { try handle(request, failure == nil ? connection : nil) } catch { failure = error }
        }
        if let failure { throw failure }
        for channel in channels.values { try attend(to: channel, connection) }
        return channels.values.compactMap { channel in
            let start = channel.hasStarted ? nil : channel.consumer.deadline
            switch channel.state {
            case .active: return start
            case .opening(let deadline): return start.map { min($0, deadline) } ?? deadline
            case .closed(let retryAt): return connection == nil ? start : start.map { min($0, retryAt) } ?? retryAt
            }
        }.min()
    }

    /// Does what is due.
    private func attend(to channel: ConsumerChannel, _ connection: Connection?) throws {
        let now = ContinuousClock.now
        if !channel.hasStarted, channel.consumer.started.isAnswered || channel.consumer.deadline <= now {
            let reason = connection == nil ? "no broker in reach" : "the broker does not answer"
            let error = MigrationError(
                .unavailable, "queue \(channel.consumer.queue) not subscribed in time: \(reason)")
            return try remove(channel, error, connection)
        }
        guard let connection else { return }
        switch channel.state {
        case .active: try acknowledge(channel, connection)
        case .closed(let retryAt) where retryAt <= now: try open(channel, connection)
        case .opening(let deadline) where deadline <= now:
            // A queue without a leader, for one: no reason to disturb the other subscriptions.
            try abandon(channel, "broker \(connection.broker) does not answer", connection)
        case .closed, .opening: break
        }
    }

    private func handle(_ request: ConsumeRequest, _ connection: Connection?) throws {
        switch request {
        case .subscribe(let consumer):
            guard let number = freeNumber else {
                let error = MigrationError(.resourceExhausted, "a connection has room for 2047 consumers")
                return consumer.started.answer(.failure(error))
            }
            let channel = ConsumerChannel(consumer, number: number)
            channels[number] = channel
            if let connection { try open(channel, connection) }
        case .cancel(let consumer):
            if let channel = channels.values.first(where: { $0.consumer === consumer }) {
                try remove(channel, MigrationError(.cancelled, "cancelled"), connection)
            }
        case .settle(let consumer, let tag, let settlement):
            guard let connection,
                let channel = channels.values.first(where: { $0.consumer === consumer && $0.generation == tag.channel })
            else { return }
            guard case .active = channel.state, channel.unsettled.remove(tag.tag) != nil else { return }
            switch settlement {
            case .ack: channel.acknowledged.append(tag.tag)
            case .requeue: try connection.reject(tag.tag, requeue: true, channel: channel.number)
            case .reject: try connection.reject(tag.tag, requeue: false, channel: channel.number)
            }
        }
    }

    /// Those before the first delivery that is still held go in one frame. Not only fewer frames: RabbitMQ forgets the
    /// settlements of a channel that ends beyond the 32 that a quorum queue has not answered yet.
    private func acknowledge(_ channel: ConsumerChannel, _ connection: Connection) throws {
        guard !channel.acknowledged.isEmpty else { return }
        let tags = channel.acknowledged.sorted()
        channel.acknowledged = []
        let held = tags.count > 1 ? channel.unsettled.min() ?? .max : 0
        let together = tags.prefix { $0 < held }
        if let last = together.last { try connection.acknowledge(last, isMultiple: true, channel: channel.number) }
        for tag in tags.dropFirst(together.count) {
            try connection.acknowledge(tag, isMultiple: false, channel: channel.number)
        }
    }

    private var freeNumber: UInt16? { (1...2047).first { channels[$0] == nil && !closing.contains($0) } }

    private func open(_ channel: ConsumerChannel, _ connection: Connection) throws {
        generation += 1
        channel.restart(generation, openBy: .now + configuration.requestTimeout)
        try connection.openChannel(channel.number)
    }

    /// Ends the subscription. Closing its channel gives back what is unsettled.
    private func remove(_ channel: ConsumerChannel, _ error: MigrationError, _ connection: Connection?) throws {
        channels[channel.number] = nil
        defer { channel.end(error) }
        guard let connection else { return }
        if case .closed = channel.state { return }
        try acknowledge(channel, connection)
        closing.insert(channel.number)
        try connection.closeChannel(channel.number)
    }

    /// Closes a channel that is of no use any more and goes on, after a while, with another.
    private func abandon(_ channel: ConsumerChannel, _ problem: String, _ connection: Connection) throws {
        guard let number = freeNumber else { throw MigrationError(.resourceExhausted, "no channel is free") }
        channels[channel.number] = nil
        closing.insert(channel.number)
        try connection.closeChannel(channel.number)
        channel.number = number
        channels[number] = channel
        channel.consumer.set(problem)
        retry(channel)
    }

    // MARK: - What the broker says

    func handle(_ frame: Frame, _ connection: Connection) throws {
        switch frame {
        case .method(let number, .channelClosed): closing.remove(number)
        case .method(let number, .channelClose(let code, let text)):
            try connection.confirmChannelClose(number)
            closing.remove(number)
            guard let channel = channels[number] else { break }
            let error = Connection.refusal(code: code, text: text)
            channel.consumer.set(error.description)
            if channel.hasStarted { retry(channel) } else { channels[number] = nil; channel.end(error) }
        case .method(let number, let method):
            guard let channel = channels[number] else { break }
            try handle(method, channel, connection)
        case .header(let number, _, _), .body(let number, _):
            guard let channel = channels[number], let content = channel.assembly.add(frame) else { break }
            try deliver(content, channel, connection)
        }
    }

    private func handle(_ method: Frame.Method, _ channel: ConsumerChannel, _ connection: Connection) throws {
        switch method {
        case .channelOpened: try connection.setPrefetch(channel.consumer.prefetch, channel: channel.number)
        case .prefetchSet: try connection.consume(channel.consumer.queue, channel: channel.number)
        case .consuming: channel.activate()
        case .deliver: channel.assembly = ContentAssembly(method)
        case .consumerCancelled:
            try abandon(channel, "the broker ended it: queue deleted, or its node lost", connection)
        default: break
        }
    }

    private func deliver(_ content: ContentAssembly.Content, _ channel: ConsumerChannel, _ connection: Connection)
        throws
    {
        guard case .deliver(let tag, _, let exchange, let key) = content.method else { return }
        channel.unsettled.insert(tag)
        let message = Message(content, exchange: exchange, routingKey: key)
        let name = DeliveryTag(channel: channel.generation, tag: tag)
        let redeliveries = content.redeliveries
        channel.consumer.hold(message, name)
        channel.consumer.mailbox.put(
            Delivery(message: message, redeliveries: redeliveries) { [inbox, consumer = channel.consumer] settlement in
                consumer.release(name)
                inbox.add(.settle(consumer, name, settlement))
            })
    }

    private func retry(_ channel: ConsumerChannel) {
        channel.failures += 1
        channel.lose()
        channel.state = .closed(retryAt: .now + configuration.backoff.delay(after: channel.failures))
    }

    func disconnected(_ error: MigrationError) {
        closing = []
        for channel in channels.values {
            channel.lose()
            channel.state = .closed(retryAt: .now)
            channel.consumer.set(error.description)
        }
    }

    func ended(_ error: MigrationError) {
        for case .subscribe(let consumer) in inbox.takeAll() { consumer.started.answer(.failure(error)) }
        for channel in channels.values { channel.end(error) }
        channels = [:]
    }
}

/// A subscription's place on the connection.
final class ConsumerChannel {
    enum State {
        case closed(retryAt: ContinuousClock.Instant)
        /// Until the broker has answered open, prefetch and consume, one after the other.
        case opening(deadline: ContinuousClock.Instant)
        case active(since: ContinuousClock.Instant)
    }

    let consumer: Consumer
    var number: UInt16
    var state = State.closed(retryAt: .now)
    var generation: UInt64 = 0
    var unsettled: Set<UInt64> = []
    /// Settled here, not sent yet.
    var acknowledged: [UInt64] = []
    var assembly = ContentAssembly()
    /// Whether it has ever been active: from then on, whatever happens, it is tried again.
    var hasStarted = false
    /// In a row, for the backoff.
    var failures = 0

    init(_ consumer: Consumer, number: UInt16) {
        self.consumer = consumer
        self.number = number
    }

    func restart(_ generation: UInt64, openBy: ContinuousClock.Instant) {
        self.generation = generation
        state = .opening(deadline: openBy)
    }

    func activate() {
        state = .active(since: .now)
        hasStarted = true
        consumer.set(nil)
        consumer.started.answer(.success(()))
    }

    /// What was delivered on the channel comes again on another.
    func lose() {
        if case .active(let since) = state, ContinuousClock.now - since > .seconds(60) { failures = 0 }
        unsettled = []
        acknowledged = []
        assembly = ContentAssembly()
        consumer.mailbox.removeAll()
        consumer.releaseAll()
    }

    func end(_ error: MigrationError) {
        lose()
        consumer.set(error.description)
        consumer.started.answer(.failure(error))
        consumer.mailbox.finish()
    }
}

extension Message {
    init(_ content: ContentAssembly.Content, exchange: String, routingKey: String) {
        self.init(exchange: exchange, routingKey: routingKey, body: content.body)
        type = content.properties.type
        contentType = content.properties.contentType
        correlationID = content.properties.correlationID
        messageID = content.properties.messageID
        userID = content.properties.userID
        sentAt = content.properties.sentAt
        headers = content.properties.headers
        // Ours to say, whatever the sender said.
        headers[Message.omittedBodySize] =
            content.size > UInt64(Message.maximumBody) ? .integer(Int64(clamping: content.size)) : nil
        headers[Message.Death.time] = content.properties.firstDeath.map { .integer($0.milliseconds) }
    }
}
