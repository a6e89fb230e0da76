import CRabbitMQ
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// Wakes a thread that waits in poll(2).
final class Wakeup: Sendable {
    let descriptor: Int32

    init() throws {
        descriptor = flotilla_eventfd()
        guard descriptor >= 0 else { throw systemError("create", "an eventfd") }
    }

    deinit { Glibc.close(descriptor) }

    func signal() {
        var one: UInt64 = 1
        // Fails only when 2^64 - 2 signals wait already.
        _ = write(descriptor, &one, 8)
    }

    func clear() {
        var count: UInt64 = 0
        _ = read(descriptor, &count, 8)
    }
}

/// What other threads ask of a link's thread.
final class Inbox<Request: Sendable>: Sendable {
    private let waiting = Mutex<[Request]>([])
    private let wakeup: Wakeup

    init(_ wakeup: Wakeup) { self.wakeup = wakeup }

    func add(_ request: Request) {
        let isFirst = waiting.withLock { waiting in
            waiting.append(request)
            return waiting.count == 1
        }
        if isFirst { wakeup.signal() }
    }

    func takeAll() -> [Request] {
        waiting.withLock { waiting in
            defer { waiting.removeAll(keepingCapacity: waiting.count < 4096) }
            return waiting
        }
    }
}

/// A caller that waits for one answer. The first answer counts.
final class Waiter: Sendable {
    private enum State {
        case new
        case waiting(CheckedContinuation<Void, any Error>)
        case answered(Result<Void, any Error>)
        case done
    }

    private let state = Mutex(State.new)

    var isAnswered: Bool {
        state.withLock {
            switch $0 {
            case .new, .waiting: false
            case .answered, .done: true
            }
        }
    }

    func answer(_ result: Result<Void, any Error>) {
        let continuation = state.withLock { state -> CheckedContinuation<Void, any Error>? in
            switch state {
            case .new: state = .answered(result)
            case .waiting(let continuation):
                state = .done
                return continuation
            case .answered, .done: break
            }
            return nil
        }
        continuation?.resume(with: result)
    }

    /// For one caller, once. A cancelled caller is answered with `cancelled`.
    func wait() async throws {
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let result = state.withLock { state -> Result<Void, any Error>? in
                    switch state {
                    case .answered(let result):
                        state = .done
                        return result
                    case .new, .waiting, .done:
                        state = .waiting(continuation)
                        return nil
                    }
                }
                if let result { continuation.resume(with: result) }
            }
        } onCancel: {
            answer(.failure(MigrationError(.cancelled, "cancelled")))
        }
    }
}
