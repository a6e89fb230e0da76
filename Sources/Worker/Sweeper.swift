import Dispatch

/// Removes what tasks left on disk, one after the other on a thread of its own. While a pool does not answer, what is to
/// be removed waits, and nothing else does.
package final class Sweeper: Sendable {
    /// Idempotent: after a crash it is called again.
    package typealias CleanUp = @Sendable (_ task: String, _ keepsResult: Bool) throws -> Void

    private let cleanUp: CleanUp
    private let queue = DispatchQueue(label: "sweeper")

    init(_ cleanUp: @escaping CleanUp) { self.cleanUp = cleanUp }

    /// Returns once nothing is left; throws what `cleanUp` throws.
    func sweep(_ task: String, keepsResult: Bool) async throws {
        try await withCheckedThrowingContinuation { continuation in
            queue.async { [cleanUp] in continuation.resume(with: Result { try cleanUp(task, keepsResult) }) }
        }
    }
}
