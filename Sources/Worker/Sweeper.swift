import HostKit
import Synchronization

/// Removes what tasks left on disk, one after the other on a thread of its own. While a pool does not answer, what is to
/// be removed waits, and nothing else does.
package final class Sweeper: Sendable {
    /// Idempotent: after a crash it is called again.
    package typealias CleanUp = @Sendable (_ task: String, _ keepsResult: Bool) throws -> Void

    private struct Request {
        let task: String
        let keepsResult: Bool
        let end: CheckedContinuation<Void, any Error>
    }

    private let cleanUp: CleanUp
    private let state = Mutex<(waiting: [Request], isAtWork: Bool)>(([], false))

    init(_ cleanUp: @escaping CleanUp) { self.cleanUp = cleanUp }

    /// Returns once nothing is left; throws what `cleanUp` throws.
    func sweep(_ task: String, keepsResult: Bool) async throws {
        try await withCheckedThrowingContinuation { continuation in
            let starts = state.withLock { state in
                state.waiting.append(Request(task: task, keepsResult: keepsResult, end: continuation))
                defer { state.isAtWork = true }
                return !state.isAtWork
            }
            if starts { spawnThread("sweeper") { self.work() } }
        }
    }

    private func work() {
        while let requests = next() {
            for request in requests {
                request.end.resume(with: Result { try cleanUp(request.task, request.keepsResult) })
            }
        }
    }

    private func next() -> [Request]? {
        state.withLock { state in
            if state.waiting.isEmpty {
                state.isAtWork = false
                return nil
            }
            defer { state.waiting = [] }
            return state.waiting
        }
    }
}
