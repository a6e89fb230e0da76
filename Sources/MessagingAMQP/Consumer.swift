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
    private let state: Mutex<BusStatus.Consumer>

    init(_ queue: String, prefetch: Int, deadline: ContinuousClock.Instant) {
        self.queue = queue
        self.prefetch = prefetch
        self.deadline = deadline
        state = Mutex(.init(queue: queue, activeSince: nil))
    }

    var status: BusStatus.Consumer { state.withLock { $0 } }

    /// - Parameter problem: why the broker does not have it registered; nil when it has.
    func set(_ problem: String?) {
        state.withLock {
            $0.activeSince = problem == nil ? .now : nil
            $0.problem = problem
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
