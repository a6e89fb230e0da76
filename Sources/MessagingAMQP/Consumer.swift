import HostKit
import Messaging
import MigrationModel
import Synchronization

/// One call of `subscribe`, as all threads see it.
final class Consumer: Sendable {
    let queue: String
    let prefetch: Int
    let deadline: ContinuousClock.Instant
    let mailbox = Mailbox()
    /// Answered when the broker has registered it, or has said why it won't, for the first time.
    let started = Waiter()

    private struct State {
        var status: BusStatus.Consumer
        /// What the channel that there is has delivered, until it is settled; with when it came.
        var held: [DeliveryTag: (task: String, message: String, since: ContinuousClock.Instant)] = [:]
    }

    private let state: Mutex<State>

    init(_ queue: String, prefetch: Int, deadline: ContinuousClock.Instant) {
        self.queue = queue
        self.prefetch = prefetch
        self.deadline = deadline
        state = Mutex(State(status: .init(queue: queue, activeSince: nil)))
    }

    var status: BusStatus.Consumer {
        state.withLock { state in
            var status = state.status
            if let (task, message, since) = state.held.values.min(by: { $0.since < $1.since }) {
                status.held = .init(
                    name: task.isEmpty ? "message \(message)" : "task \(task)", duration: ContinuousClock.now - since)
            }
            return status
        }
    }

    func hold(_ message: Message, _ tag: DeliveryTag) {
        state.withLock { $0.held[tag] = (message.correlationID, message.messageID, ContinuousClock.now) }
    }
    func release(_ tag: DeliveryTag) { state.withLock { _ = $0.held.removeValue(forKey: tag) } }
    func releaseAll() { state.withLock { $0.held = [:] } }

    /// - Parameter problem: why the broker does not have it registered; nil when it has.
    func set(_ problem: String?) {
        state.withLock {
            $0.status.activeSince = problem == nil ? .now : nil
            $0.status.problem = problem
        }
    }
}

/// What other threads ask of the consume link.
enum ConsumeRequest: Sendable {
    case subscribe(Consumer)
    case cancel(Consumer)
    case settle(Consumer, DeliveryTag, Settlement)
}

/// Names a delivery on the wire: tags start again from 1 on every channel.
struct DeliveryTag: Sendable, Hashable {
    /// Of the channel, unique within the link.
    var channel: UInt64
    var tag: UInt64
}
