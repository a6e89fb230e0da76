import FlotillaProtocol
import Logging
import MigrationModel
import SwiftProtobuf
import Synchronization

/// What a task left on this host is removed beside everything else: a pool that does not answer must keep neither a
/// lease nor a permit waiting. Of one task there is one sweep at a time, and no attempt begins before it is over.
extension BusServerTransport {
    /// Begins what a control message asks for: to forget an attempt whose result is stored, or to clean up after a
    /// cancelled task that nobody works on here. Returns false when it can't be now; both are said again.
    func sweep(_ message: ControlMessage) -> Bool {
        let task = message.taskID
        let begins = state.withLock { state in
            if state.sweeps[task] != nil { return false }
            if let call = state.calls[task] {
                // An attempt whose end is stored has nothing left to do. Any other has the task's files.
                guard case .stored = message.kind, call.identity.fence == message.fence else { return false }
            }
            state.sweeps[task] = []
            return true
        }
        guard begins else { return false }
        // Nobody waits for it: a sweep that hangs must not keep the process from ending.
        Task {
            do {
                switch message.kind {
                case .stored: try await ledger.acknowledge(task: task, fence: message.fence)
                case .cancel(let cancel): try await discard(task, message.fence, cancel.reason)
                case .lease, .permit, nil: break
                }
            } catch {
                logger.error("not cleaned up after", metadata: ["task": "\(task)", "error": "\(error)"])
            }
            let waiting = state.withLock { $0.sweeps.removeValue(forKey: task) } ?? []
            for continuation in waiting { continuation.resume() }
        }
        return true
    }

    /// Returns once no sweep of the task is under way, at least for a moment.
    func sweepEnded(of task: String) async {
        await withCheckedContinuation { continuation in
            let isOver = state.withLock { $0.sweeps[task]?.append(continuation) == nil }
            if isOver { continuation.resume() }
        }
    }

    /// The coordinator says it again until it is told that nothing is left.
    private func discard(_ task: String, _ fence: UInt64, _ reason: String) async throws {
        guard try await ledger.discard(task: task, fence: fence) else { return }
        // Which attempt it was is known to the coordinator: the fence names it.
        let call = CallIdentity(task: task, attempt: 0, fence: fence)
        let ended = TaskEnded.with {
            $0.code = Int32(MigrationError.Code.cancelled.rawValue)
            $0.message = reason
        }
        try await events.publish(TaskEvent(call, sequence: Self.discardSequence, .ended(ended)))
    }
}
