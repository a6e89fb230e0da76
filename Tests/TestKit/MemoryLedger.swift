package import FlotillaProtocol
package import Messaging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// A ledger that forgets with its process; for tests of what sits on top of it.
package final class MemoryLedger: TaskLedger {
    private struct State {
        var admitted: [TaskCall] = []
        var fences: [String: UInt64] = [:]
        var ended: [String: TaskEvent] = [:]
        var answers: [String: Admission] = [:]
        var discarded: [String] = []
        var held: Set<String> = []
        var waiting: [CheckedContinuation<Void, Never>] = []
    }

    private let state = Mutex(State())

    package init() {}

    package var admitted: [TaskCall] { state.withLock { $0.admitted } }

    package var discarded: [String] { state.withLock { $0.discarded } }

    /// What the next admission of this task is answered with.
    package func answer(_ task: String, _ admission: Admission) { state.withLock { $0.answers[task] = admission } }

    /// Lets what is to be discarded of this task wait, as a disk that does not answer would.
    package func hold(_ task: String) { state.withLock { _ = $0.held.insert(task) } }

    /// What is to be discarded and has to wait.
    package var waiting: Int { state.withLock { $0.waiting.count } }

    package func letGo() {
        let waiting = state.withLock { state in
            defer { (state.held, state.waiting) = ([], []) }
            return state.waiting
        }
        for continuation in waiting { continuation.resume() }
    }

    package func admit(_ call: TaskCall) async throws -> Admission {
        state.withLock { state in
            if let answer = state.answers.removeValue(forKey: call.identity.task) { return answer }
            if call.identity.fence < state.fences[call.identity.task] ?? 0 { return .stale }
            state.fences[call.identity.task] = call.identity.fence
            state.admitted.append(call)
            return .run
        }
    }

    package func recordEnd(of call: CallIdentity, _ event: TaskEvent) async throws {
        state.withLock { $0.ended[call.task] = event }
    }

    package func recordStop(of call: CallIdentity) async throws {}

    package func acknowledge(task: String, fence: UInt64) async throws {
        state.withLock { if $0.ended[task]?.fence == fence { $0.ended[task] = nil } }
    }

    package func discard(task: String, fence: UInt64) async throws -> Bool {
        await withCheckedContinuation { continuation in
            let isHeld = state.withLock { state in
                if state.held.contains(task) { state.waiting.append(continuation) }
                return state.held.contains(task)
            }
            if !isHeld { continuation.resume() }
        }
        return state.withLock { state in
            if state.fences[task] ?? 0 > fence || state.ended[task] != nil { return false }
            state.discarded.append(task)
            return true
        }
    }

    package func unacknowledged() async -> [TaskEvent] { state.withLock { Array($0.ended.values) } }
}
