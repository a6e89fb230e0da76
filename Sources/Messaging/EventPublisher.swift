package import FlotillaProtocol
import FoundationEssentials
import HostKit
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// Publishes what a worker has to say, under its own name and signature. Events that come while a message is on its way
/// travel together in the next one, so that a busy worker pays for one signature and one confirm, not for hundreds.
package final class EventPublisher: Sendable {
    private struct Waiting {
        /// A `WorkerEvent`.
        let bytes: [UInt8]
        /// Last part of the routing key of a message that begins with it.
        let kind: String
        let published: CheckedContinuation<Void, any Error>
    }

    private struct State {
        var waiting: [Waiting] = []
        var isSending = false
    }

    /// Property `type` of what it publishes.
    package static let messageType = "flotilla.v1.WorkerEvents"

    /// Results wait in the queue for as long as the coordinator is down.
    private static let validity = Duration.seconds(7 * 24 * 3600)
    /// What an event adds to a message besides its own bytes, at most.
    private static let overhead = 16
    /// Events of one message; the coordinator applies them in one transaction.
    private static let batch = 256

    private let bus: any MessageBus
    private let names: Names
    private let member: FleetMember
    private let state = Mutex(State())

    package init(bus: any MessageBus, names: Names, member: FleetMember) {
        self.bus = bus
        self.names = names
        self.member = member
    }

    /// Returns once the bus has the event. Events of one caller arrive in the order of its calls.
    package func publish(_ event: TaskEvent) async throws { try await publish(.task(event)) }

    package func publish(_ event: WorkerEvent.OneOf_Event) async throws {
        let kind =
            switch event {
            case .inventory: "inventory"
            case .rejected: "rejected"
            case .heartbeat: "heartbeat"
            case .task: "task"
            }
        let bytes: [UInt8] = try WorkerEvent.with {
            $0.time = Moment.now.timestamp
            $0.event = event
        }.serializedBytes()
        try await withCheckedThrowingContinuation { continuation in
            let starts = state.withLock { state in
                state.waiting.append(Waiting(bytes: bytes, kind: kind, published: continuation))
                defer { state.isSending = true }
                return !state.isSending
            }
            if starts { Task { await self.send() } }
        }
    }

    /// Publishes a message without events, to find out whether one would be taken.
    package func probe() async throws { try await send([]) }

    @concurrent
    private func send() async {
        while let batch = next() {
            let result: Result<Void, any Error>
            do { result = .success(try await send(batch)) } catch { result = .failure(error) }
            for waiting in batch { waiting.published.resume(with: result) }
        }
    }

    /// As many events as fit into a message, or nil when none wait.
    private func next() -> [Waiting]? {
        state.withLock { state in
            var room = Message.maximumBody - member.name.utf8.count - 64
            var count = 0
            for waiting in state.waiting.prefix(Self.batch) {
                room -= waiting.bytes.count + Self.overhead
                // One that is too large on its own is for the bus to refuse.
                if room < 0 && count > 0 { break }
                count += 1
            }
            guard count > 0 else {
                state.isSending = false
                return nil
            }
            defer { state.waiting.removeFirst(count) }
            return Array(state.waiting[..<count])
        }
    }

    private func send(_ batch: [Waiting]) async throws {
        // A `WorkerEvents`. Its events were serialized when they came: a message's fields are those of its parts.
        var body: [UInt8] = try WorkerEvents.with { $0.host = member.name }.serializedBytes()
        for waiting in batch { body.appendEvent(waiting.bytes) }
        // A probe has no event.
        let key = names.eventKey(host: member.name, kind: batch.first?.kind ?? "task")
        var message = Message(exchange: names.events, routingKey: key, body: body)
        message.type = Self.messageType
        message.messageID = UUID().uuidString.lowercased()
        message.userID = member.name
        member.sign(&message, for: FleetMember.coordinator, validity: Self.validity)
        try await bus.publish(message)
    }
}

extension [UInt8] {
    /// Field 2 of `WorkerEvents`, with its length as a varint
    /// (https://protobuf.dev/programming-guides/encoding/#length-types).
    fileprivate mutating func appendEvent(_ event: [UInt8]) {
        append(2 << 3 | 2)
        var length = event.count
        while length >= 0x80 {
            append(UInt8(length & 0x7f) | 0x80)
            length >>= 7
        }
        append(UInt8(length))
        append(contentsOf: event)
    }
}

extension TaskEvent {
    package init(_ call: CallIdentity, sequence: UInt64, _ kind: OneOf_Kind) {
        self.init()
        taskID = call.task
        attempt = call.attempt
        fence = call.fence
        seq = sequence
        self.kind = kind
    }

    package var identity: CallIdentity { CallIdentity(task: taskID, attempt: attempt, fence: fence) }
}
