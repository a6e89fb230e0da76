import Messaging
import Synchronization

/// Deliveries on their way to one consumer. Unlike an AsyncStream's own buffer it can be emptied: what a lost channel
/// had delivered comes again.
final class Mailbox: Sendable {
    private struct State {
        var waiting: [Delivery] = []
        /// Deliveries before this one have been taken.
        var head = 0
        var receiver: CheckedContinuation<Delivery?, Never>?
        var isFinished = false
    }

    private let state = Mutex(State())

    var deliveries: AsyncStream<Delivery> {
        AsyncStream {
            await self.next()
        } onCancel: { [weak self] in
            self?.releaseReceiver()
        }
    }

    func put(_ delivery: Delivery) {
        let receiver = state.withLock { state -> CheckedContinuation<Delivery?, Never>? in
            guard !state.isFinished else { return nil }
            if let receiver = state.receiver {
                state.receiver = nil
                return receiver
            }
            state.waiting.append(delivery)
            return nil
        }
        receiver?.resume(returning: delivery)
    }

    func removeAll() {
        state.withLock { state in
            state.waiting = []
            state.head = 0
        }
    }

    /// Ends the stream; what waits is dropped.
    func finish() {
        removeAll()
        let receiver = state.withLock { state in
            state.isFinished = true
            return state.receiver.take()
        }
        receiver?.resume(returning: nil)
    }

    private func releaseReceiver() { state.withLock { $0.receiver.take() }?.resume(returning: nil) }

    private func next() async -> Delivery? {
        await withCheckedContinuation { continuation in
            let answer = state.withLock { state -> Delivery?? in
                if state.head < state.waiting.count {
                    let delivery = state.waiting[state.head]
                    state.head += 1
                    if state.head == state.waiting.count || state.head >= 256 {
                        state.waiting.removeFirst(state.head)
                        state.head = 0
                    }
                    return .some(delivery)
                }
                if state.isFinished || state.receiver != nil || Task.isCancelled { return .some(nil) }
                state.receiver = continuation
                return nil
            }
            if let answer { continuation.resume(returning: answer) }
        }
    }
}
