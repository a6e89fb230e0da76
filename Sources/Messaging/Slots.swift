import Synchronization

/// Lets a number of callers in at once; the others wait in order and can give up waiting.
package final class Slots: Sendable {
    private struct State {
        var free: Int
        var next = 0
        var waiting: [(ticket: Int, continuation: CheckedContinuation<Bool, Never>)] = []
        var abandoned: Set<Int> = []
    }

    private let state: Mutex<State>

    package init(_ count: Int) { state = Mutex(State(free: max(count, 1))) }

    /// Names a wait before it begins, so that it can be given up at any time.
    func ticket() -> Int {
        state.withLock {
            $0.next += 1
            return $0.next
        }
    }

    /// Ends the wait of `enter` with false, also one that has yet to begin.
    func abandon(_ ticket: Int) {
        let waiting: CheckedContinuation<Bool, Never>? = state.withLock { state in
            guard let index = state.waiting.firstIndex(where: { $0.ticket == ticket }) else {
                state.abandoned.insert(ticket)
                return nil
            }
            return state.waiting.remove(at: index).continuation
        }
        waiting?.resume(returning: false)
    }

    /// True once the caller is in, and owes a `leave`.
    func enter(_ ticket: Int) async -> Bool {
        await withCheckedContinuation { continuation in
            let answer: Bool? = state.withLock { state in
                if state.abandoned.remove(ticket) != nil { return false }
                if state.free > 0 {
                    state.free -= 1
                    return true
                }
                state.waiting.append((ticket, continuation))
                return nil
            }
            if let answer { continuation.resume(returning: answer) }
        }
    }

    /// - Parameter ticket: of the caller; what was to give up its wait has nothing to do any more.
    func leave(_ ticket: Int) {
        let next: CheckedContinuation<Bool, Never>? = state.withLock { state in
            state.abandoned.remove(ticket)
            if state.waiting.isEmpty {
                state.free += 1
                return nil
            }
            return state.waiting.removeFirst().continuation
        }
        next?.resume(returning: true)
    }

    /// - Throws: `CancellationError` when the task is cancelled while it waits.
    package func with<Value>(_ body: () async throws -> Value) async throws -> Value {
        let ticket = ticket()
        let isIn = await withTaskCancellationHandler {
            await enter(ticket)
        } onCancel: {
            abandon(ticket)
        }
        guard isIn else { throw CancellationError() }
        defer { leave(ticket) }
        return try await body()
    }
}
