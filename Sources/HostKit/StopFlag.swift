package import MigrationModel
import Synchronization

/// Tells blocking work to stop, and why. Set once; the first reason stays.
///
/// Blocking code calls `check()` at least every few hundred milliseconds of work.
package final class StopFlag: Sendable {
    private struct State {
        var reason: MigrationError?
        /// One for each thread that waits.
        var waiting: [MonotonicSemaphore] = []
    }

    private let stopped = Atomic<Bool>(false)
    private let state = Mutex(State())

    package init() {}

    package var isSet: Bool { stopped.load(ordering: .relaxed) }

    package func set(_ why: MigrationError = MigrationError(.cancelled, "cancelled")) {
        let waiting = state.withLock { state in
            if state.reason == nil { state.reason = why }
            stopped.store(true, ordering: .releasing)
            return state.waiting
        }
        for thread in waiting { thread.signal() }
    }

    /// Throws the reason once the flag is set.
    package func check() throws {
        guard stopped.load(ordering: .acquiring) else { return }
        throw state.withLock { $0.reason } ?? MigrationError(.cancelled, "cancelled")
    }

    /// Blocks the calling thread for that long. Throws the reason as soon as the flag is set.
    package func wait(for duration: Duration) throws {
        let wakeUp = MonotonicSemaphore()
        state.withLock { if $0.reason == nil { $0.waiting.append(wakeUp) } else { wakeUp.signal() } }
        defer { state.withLock { $0.waiting.removeAll { $0 === wakeUp } } }
        _ = wakeUp.wait(for: duration)
        try check()
    }
}

/// Runs blocking work that stops when the calling Swift task is cancelled.
package func blockingCancellable<Value: Sendable>(
    _ name: String, stop: StopFlag = StopFlag(), _ body: @escaping @Sendable (StopFlag) throws -> Value
) async throws -> Value {
    try await withTaskCancellationHandler {
        try await blocking(name) { try body(stop) }
    } onCancel: {
        stop.set()
    }
}
