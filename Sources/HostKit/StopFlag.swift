package import MigrationModel
import Synchronization

/// Tells blocking work to stop, and why. Set once; the first reason stays.
///
/// Blocking code calls `check()` at least every few hundred milliseconds of work.
package final class StopFlag: Sendable {
    private let stopped = Atomic<Bool>(false)
    private let reason = Mutex<MigrationError?>(nil)

    package init() {}

    package var isSet: Bool { stopped.load(ordering: .relaxed) }

    package func set(_ why: MigrationError = MigrationError(.cancelled, "cancelled")) {
        reason.withLock { if $0 == nil { $0 = why } }
        stopped.store(true, ordering: .releasing)
    }

    /// Throws the reason once the flag is set.
    package func check() throws {
        guard stopped.load(ordering: .acquiring) else { return }
        throw reason.withLock { $0 } ?? MigrationError(.cancelled, "cancelled")
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
