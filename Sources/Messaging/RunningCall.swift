import FlotillaProtocol
import GRPCCore
import MigrationModel
import Synchronization

/// One attempt of a task while it runs on this worker: its lease, its event counter, the permits it waits for.
final class RunningCall: Sendable {
    enum StopReason: Sendable, Equatable {
        /// The deadline passed.
        case deadline
        /// A person or the coordinator cancelled the task.
        case cancelled(String)
        /// The lease ran out or was revoked, or a newer attempt arrived: nothing may be written or said any more.
        case lostOwnership(String)
        /// This process is ending; the task goes on in the next one.
        case shutdown
    }

    let identity: CallIdentity

    private struct State {
        var sequence: UInt64 = 0
        /// When the events that a renewal may answer were sent.
        var sent: [UInt64: ContinuousClock.Instant] = [:]
        var lease: Duration
        var leaseUntil: ContinuousClock.Instant
        var stopReason: StopReason?
        var stoppedAt: ContinuousClock.Instant?
        /// When its handler began, or last reported something; nil while none runs.
        var heardAt: ContinuousClock.Instant?
        /// The silence after which it is warned of next.
        var warning: Duration?
        var cancel: [@Sendable () -> Void] = []
        var permits: [String: CheckedContinuation<Void, any Error>] = [:]
        var ended = false
        var waitingForEnd: [CheckedContinuation<Void, Never>] = []
    }

    private let state: Mutex<State>

    /// - Parameter lease: how long it may go on without an answer to its first event.
    init(_ identity: CallIdentity, lease: Duration) {
        self.identity = identity
        state = Mutex(State(lease: lease, leaseUntil: .now + lease))
    }

    var stopReason: StopReason? { state.withLock { $0.stopReason } }
    /// How long it has been going on since it was stopped; nil when it was not.
    var overtime: Duration? { state.withLock { $0.stoppedAt.map { ContinuousClock.now - $0 } } }
    /// A quarter of the lease is left: kept to stop in.
    var mustStop: Bool { state.withLock { $0.leaseUntil - $0.lease / 4 < .now } }
    var pendingPermits: [String] { state.withLock { Array($0.permits.keys) } }

    /// Its handler begins, reports something, or has ended.
    func noteProgress(isOver: Bool = false, now: ContinuousClock.Instant = .now) {
        state.withLock { ($0.heardAt, $0.warning) = (isOver ? nil : now, nil) }
    }

    /// How long its handler has reported nothing, and whether that is to be said: once when it reaches `limit`, then
    /// each time that it has doubled. Nil before.
    func silence(
        of limit: Duration, now: ContinuousClock.Instant = .now
    ) -> (duration: Duration, isNews: Bool)? {
        state.withLock { state in
            guard let silence = state.heardAt.map({ now - $0 }), silence >= limit else { return nil }
            let isNews = silence >= state.warning ?? limit
            if isNews { state.warning = silence * 2 }
            return (silence, isNews)
        }
    }

    /// Numbers an event, and remembers when it was sent if it asks for a lease.
    func nextSequence(asksForLease: Bool = false) -> UInt64 {
        state.withLock {
            $0.sequence += 1
            if asksForLease { $0.sent[$0.sequence] = .now }
            return $0.sequence
        }
    }

    /// The lease runs from when the answered event was sent, not from when the answer came.
    func renew(answering sequence: UInt64, ttl: Duration) {
        state.withLock {
            guard let sent = $0.sent.removeValue(forKey: sequence) else { return }
            $0.sent = $0.sent.filter { $0.key > sequence }
            $0.lease = ttl
            $0.leaseUntil = max($0.leaseUntil, sent + ttl)
        }
    }

    /// Adds what is done to stop the call. Called at once if it was stopped before.
    func onStop(_ cancel: @escaping @Sendable () -> Void) {
        let stopped = state.withLock {
            $0.cancel.append(cancel)
            return $0.stopReason != nil
        }
        if stopped { cancel() }
    }

    /// The first reason stays.
    func stop(_ reason: StopReason) {
        let (cancel, permits): ([@Sendable () -> Void], [String: CheckedContinuation<Void, any Error>]) =
            state.withLock {
                state in
                guard state.stopReason == nil else { return ([], [:]) }
                state.stopReason = reason
                state.stoppedAt = .now
                defer { state.permits = [:] }
                return (state.cancel, state.permits)
            }
        for permit in permits.values { permit.resume(throwing: MigrationError(.cancelled, "stopped: \(reason)")) }
        for action in cancel { action() }
    }

    /// Waits for the coordinator's answer. `ask` sends the question and is called once the answer can be received;
    /// the heartbeat asks again while no answer comes.
    func permit(_ step: String, ask: @escaping @Sendable () async -> Void) async throws {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
            let stopped = state.withLock { state in
                if state.stopReason == nil { state.permits[step] = continuation }
                return state.stopReason != nil
            }
            if stopped {
                continuation.resume(throwing: MigrationError(.cancelled, "stopped"))
            } else {
                Task { await ask() }
            }
        }
    }

    func answer(_ reply: PermitReply) {
        guard let permit = state.withLock({ $0.permits.removeValue(forKey: reply.step) }) else { return }
        if reply.granted {
            permit.resume()
        } else {
            permit.resume(
                throwing: MigrationError(.aborted, "the coordinator refused the step \(reply.step): \(reply.reason)"))
        }
    }

    func markEnded() {
        let waiting = state.withLock { state in
            state.ended = true
            defer { state.waitingForEnd = [] }
            return state.waitingForEnd
        }
        for continuation in waiting { continuation.resume() }
    }

    func waitForEnd() async {
        await withCheckedContinuation { continuation in
            let ended = state.withLock {
                if !$0.ended { $0.waitingForEnd.append(continuation) }
                return $0.ended
            }
            if ended { continuation.resume() }
        }
    }
}
