import CRabbitMQ
import Messaging
import MigrationModel

/// One call of `publish`.
final class PendingPublish: Sendable {
    let message: Message
    let deadline: ContinuousClock.Instant
    let waiter = Waiter()

    init(_ message: Message, deadline: ContinuousClock.Instant) {
        self.message = message
        self.deadline = deadline
    }

    func fail(_ error: MigrationError) { waiter.answer(.failure(error)) }
}

/// Publishes with confirms on one channel.
///
/// A message that waits to be sent survives the loss of the connection and is sent on the next. One that was sent but
/// not confirmed fails with `unavailable` instead: only its caller knows whether sending it twice is right.
///
/// A message that the broker refuses (unknown exchange, no permission, forged user) ends the channel without a word on
/// which one it was. Everything unconfirmed is then sent again one by one on a new channel, until the one in flight
/// when the channel ends is the culprit. So the others arrive, some of them twice.
final class PublishRole: LinkRole {
    private enum Channel { case closed, opening, confirming, open }

    /// Unconfirmed messages at a time, and their bodies together. More is no faster, and less memory is better.
    private static let windowCount = 1000
    private static let windowSize = 8 << 20
    private static let number: UInt16 = 1

    private let inbox: Inbox<PendingPublish>
    private let timeout: Duration
    private let requestTimeout: Duration
    private var channel = Channel.closed
    /// When a channel that isn't open by then counts as a broker that doesn't answer.
    private var openBy = ContinuousClock.now
    private var window = ConfirmWindow<PendingPublish>()
    /// In the order they came, which is that of their deadlines. Those before `sent` have gone.
    private var backlog: [PendingPublish] = []
    private var sent = 0
    /// Of the backlog's first, any of which may have ended the last channel.
    private var suspects = 0
    /// Whether one of them is in flight, alone.
    private var isTesting = false
    /// Fragments of a returned message.
    private var returning = ContentAssembly()

    init(_ inbox: Inbox<PendingPublish>, _ configuration: AMQPConfiguration) {
        self.inbox = inbox
        timeout = configuration.publishTimeout
        requestTimeout = configuration.requestTimeout
    }

    var isIdle: Bool { window.count == 0 && sent == backlog.count }

    func connected(_ connection: Connection) throws {
        channel = .opening
        openBy = .now + requestTimeout
        try connection.openChannel(Self.number)
    }

    func work(_ connection: Connection?) throws -> ContinuousClock.Instant? {
        backlog += inbox.takeAll()
        expire(connection)
        guard let connection else { return nextDeadline }
        if channel == .open {
            if connection.blocked == nil, sent < backlog.count { try connection.together { try sendAll(connection) } }
            return nextDeadline
        }
        guard openBy > .now else {
            throw MigrationError(.unavailable, "broker \(connection.broker) does not open a channel")
        }
        return nextDeadline.map { min($0, openBy) } ?? openBy
    }

    private var nextDeadline: ContinuousClock.Instant? {
        [window.oldest?.deadline, sent < backlog.count ? backlog[sent].deadline : nil].compactMap(\.self).min()
    }

    private func sendAll(_ connection: Connection) throws {
        if isTesting, window.count > 0 { return }
        isTesting = false
        while sent < backlog.count, window.count < Self.windowCount, window.size < Self.windowSize, !isTesting {
            if suspects > 0, window.count > 0 { break }
            let next = backlog[sent]
            // Entered before it is sent: when sending fails, it may have arrived.
            sent += 1
            let isSuspect = suspects > 0
            if isSuspect { suspects -= 1 }
            guard !next.waiter.isAnswered else { continue }
            isTesting = isSuspect
            let tag = window.nextTag
            window.append(next, size: next.message.body.count)
            try connection.publish(next.message, tag: tag, channel: Self.number)
        }
        forgetSent()
    }

    private func forgetSent() {
        if sent == backlog.count || sent >= 1024 {
            backlog.removeFirst(sent)
            sent = 0
        }
    }

    private func expire(_ connection: Connection?) {
        let now = ContinuousClock.now
        while sent < backlog.count, backlog[sent].deadline <= now || backlog[sent].waiter.isAnswered {
            let reason = connection?.blocked.map { "the broker takes no messages: \($0)" } ?? "no broker in reach"
            backlog[sent].fail(MigrationError(.unavailable, "message not sent within \(timeout): \(reason)"))
            sent += 1
            if suspects > 0 { suspects -= 1 }
        }
        forgetSent()
        while let late = window.removeOldest(where: { $0.deadline <= now || $0.waiter.isAnswered }) {
            let reason = connection?.blocked.map { "it takes none: \($0)" } ?? "its queue may have lost its majority"
            late.fail(
                MigrationError(
                    .unavailable, "message sent, but not confirmed by the broker within \(timeout): \(reason)"))
        }
    }

    func handle(_ frame: Frame, _ connection: Connection) throws {
        switch frame {
        case .method(_, let method): try handle(method, connection)
        case .header, .body:
            guard let content = returning.add(frame), case .returned(let code, let text) = content.method,
                let tag = content.properties.publishTag
            else { break }
            window.markReturned(tag, "\(code) \(text)")
        }
    }

    private func handle(_ method: Frame.Method, _ connection: Connection) throws {
        switch method {
        case .channelOpened:
            channel = .confirming
            try connection.send(
                AMQP_CONFIRM_SELECT_METHOD, amqp_confirm_select_t(nowait: 0), channel: Self.number)
        case .confirming: channel = .open
        case .returned: returning = ContentAssembly(method, keepsBody: false)
        case .confirmed(let tag, let isMultiple):
            for slot in window.confirm(tag, isMultiple: isMultiple) {
                if let reason = slot.returned {
                    let message = slot.entry.message
                    slot.entry.fail(
                        MigrationError(
                            .notFound,
                            "no queue takes messages of exchange \(message.exchange) with key \(message.routingKey)"
                                + " (\(reason))"))
                } else {
                    slot.entry.waiter.answer(.success(()))
                }
            }
        case .refused(let tag, let isMultiple):
            for slot in window.confirm(tag, isMultiple: isMultiple) {
                slot.entry.fail(
                    MigrationError(
                        .resourceExhausted,
                        "a queue of exchange \(slot.entry.message.exchange) with key \(slot.entry.message.routingKey)"
                            + " refuses the message: it is full, or its broker is in trouble"))
            }
        case .channelClose(let code, let text): try channelClosed(code, text, connection)
        default: break
        }
    }

    private func channelClosed(_ code: UInt16, _ text: String, _ connection: Connection) throws {
        let error = Connection.refusal(code: code, text: text)
        guard channel == .open else { throw error }
        // One that was given up may still be the culprit.
        let isCertain = window.count == 1 && window.abandoned == 0
        var unconfirmed = window.removeAll()
        isTesting = false
        if isCertain {
            unconfirmed[0].fail(error)
            unconfirmed = []
        }
        backlog.replaceSubrange(0..<sent, with: unconfirmed)
        sent = 0
        suspects += unconfirmed.count
        returning = ContentAssembly()
        try connection.confirmChannelClose(Self.number)
        try connected(connection)
    }

    func disconnected(_ error: MigrationError) {
        channel = .closed
        isTesting = false
        returning = ContentAssembly()
        for lost in window.removeAll() {
            lost.fail(
                MigrationError(
                    .unavailable, "message sent, but the connection was lost before its confirm", cause: error))
        }
    }

    func ended(_ error: MigrationError) {
        disconnected(error)
        for waiting in backlog[sent...] + inbox.takeAll() { waiting.fail(error) }
        backlog = []
        sent = 0
    }
}
