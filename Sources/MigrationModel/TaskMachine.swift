/// One task's life, as a value: events in, actions out, no clock and no I/O of its own.
///
/// ```
///            dispatch          accepted            ended ok
///  waiting ------------> sent ----------> running ------------> succeeded
///     ^                    |                 |   ended, retryable / lease expired or released
///     +--------------------+-----------------+--------------------------+
///                                            |   ended, final; lost too often; expired --> failed
///                                            |   cancel        --> cancelled <-- cancel -- failed
/// ```
/// Every dispatch raises `attempt` and `fence`. What carries an older fence changes nothing: its worker may still
/// be running, but it no longer owns the task.
package struct TaskMachine: Hashable, Sendable {
    package enum State: Hashable, Sendable {
        /// To be sent, not before the given moment.
        case waiting(notBefore: Moment)
        /// In the outbox or in the host's queue.
        case sent
        /// A worker holds the lease.
        case running(leaseUntil: Moment)
        case succeeded
        case failed(code: Int)
        case cancelled
    }

    package enum Event: Sendable {
        /// Time has come to send it, if it is due.
        case dispatch
        case accepted(fence: UInt64)
        case heartbeat(fence: UInt64)
        case ended(fence: UInt64, outcome: Outcome)
        /// The host's new process says that the one which held this fence is gone, and not because of it if `blameless`.
        case released(fence: UInt64, blameless: Bool = false)
        /// Time has passed.
        case tick
        /// The worker that had it is known to be gone (its process ended), so no lease needs to run out.
        case orphaned
        /// The host's worker lives and has not taken it on in all the time since it was sent.
        case unclaimed
        /// The host's worker lives, and this task is cancelled.
        case alive
        /// Its deadline has passed, and whoever worked on it had the time to say so.
        case expire
        /// Run it again although it ended; a person or an earlier stage asked for it.
        case restart
        case cancel
    }

    package enum Outcome: Hashable, Sendable {
        case success
        /// A gRPC status code.
        case failure(code: Int)
    }

    package enum Action: Hashable, Sendable {
        /// Put the task into the outbox under this attempt and fence.
        case send(attempt: UInt32, fence: UInt64)
        case renewLease(fence: UInt64)
        /// The sender does not own the task: tell it to stop and be silent.
        case revoke(fence: UInt64)
        /// The task is no longer wanted: tell its worker to stop, clean up and report.
        case cancel(fence: UInt64)
        /// The task ended with this outcome, now and for good.
        case finish(Outcome)
    }

    /// How long a worker owns a task without a heartbeat, and how failures are retried.
    package struct Policy: Sendable {
        package var leaseDuration: Duration
        /// Failures after which a retryable task is failed for good.
        package var maximumFailures: Int
        /// Wait after the first failure; doubles with each, up to a minute.
        package var backoff: Duration
        /// Attempts that may be lost with their worker before the task is failed for good: one that ends whoever takes it
        /// would do so for ever.
        package var maximumLosses: Int

        static let longestBackoff = Duration.seconds(60)

        /// No task waits for longer, for its lease or for its turn.
        package var longestWait: Duration { max(leaseDuration, Self.longestBackoff) }

        package init(
            leaseDuration: Duration = .seconds(60), maximumFailures: Int = 3, backoff: Duration = .seconds(1),
            maximumLosses: Int = 10
        ) {
            self.leaseDuration = leaseDuration
            self.maximumFailures = maximumFailures
            self.backoff = backoff
            self.maximumLosses = maximumLosses
        }

        func pause(after count: Int) -> Duration { min(backoff * (1 << min(count - 1, 6)), Self.longestBackoff) }
    }

    package private(set) var state: State
    /// 0 before the first dispatch.
    package private(set) var attempt: UInt32 = 0
    package private(set) var fence: UInt64 = 0
    /// Ends with a retryable failure since the last restart.
    package private(set) var failures = 0
    /// Attempts since the last restart that ended without a word of their worker. Orphans don't count: a person ended those.
    package private(set) var losses = 0
    /// It was cancelled, and no worker has said yet that nothing of it is left on the host.
    package private(set) var isUnswept = false

    package init(now: Moment) { state = .waiting(notBefore: now) }

    /// As it was stored.
    package init(state: State, attempt: UInt32, fence: UInt64, failures: Int, losses: Int, isUnswept: Bool) {
        (self.state, self.attempt, self.fence) = (state, attempt, fence)
        (self.failures, self.losses, self.isUnswept) = (failures, losses, isUnswept)
    }

    /// Its next fence will be larger than any of `other`, whose work it takes back or does again.
    package mutating func outrank(_ other: TaskMachine) { fence = max(fence, other.fence) }

    /// It was cancelled, and had been done before its worker heard of that: what it made is there, and known.
    package mutating func countAsDone() {
        if state == .cancelled { state = .succeeded }
    }

    package var isEnded: Bool {
        switch state {
        case .succeeded, .failed, .cancelled: true
        case .waiting, .sent, .running: false
        }
    }

    package mutating func handle(_ event: Event, now: Moment, policy: Policy) -> [Action] {
        switch (event, state) {
        case (.dispatch, .waiting(let notBefore)) where notBefore <= now:
            attempt += 1
            fence += 1
            state = .sent
            return [.send(attempt: attempt, fence: fence)]

        // It was told, but may have taken the task on only then, or not have heard.
        case (.accepted(let from), .cancelled), (.heartbeat(let from), .cancelled):
            return from == fence ? [.cancel(fence: fence)] : [.revoke(fence: from)]

        case (.released(let from, _), .cancelled) where from == fence:
            return [.cancel(fence: fence)]

        case (.alive, .cancelled) where isUnswept:
            return [.cancel(fence: fence)]

        // After any other end its work stays on the host, for another attempt.
        case (.ended(let from, let outcome), .cancelled) where from == fence:
            if outcome == .success || outcome == .failure(code: MigrationError.Code.cancelled.rawValue) {
                isUnswept = false
            }
            return []

        case (.accepted(let from), _), (.heartbeat(let from), _):
            guard from == fence, !isEnded else { return [.revoke(fence: from)] }
            switch state {
            case .sent, .running:
                state = .running(leaseUntil: now + policy.leaseDuration)
                return [.renewLease(fence: fence)]
            default: return [.revoke(fence: from)]
            }

        case (.ended(let from, let outcome), .sent), (.ended(let from, let outcome), .running):
            guard from == fence else { return [] }
            return end(outcome, now: now, policy: policy)

        case (.tick, .running(let leaseUntil)) where leaseUntil <= now:
            return [.revoke(fence: fence)] + lose(now: now, policy: policy)

        // Nothing waits that long: the clock was set back since.
        case (.tick, .running(let leaseUntil)) where leaseUntil > now + policy.leaseDuration:
            state = .running(leaseUntil: now + policy.leaseDuration)
            return []

        case (.tick, .waiting(let notBefore)) where notBefore > now + Policy.longestBackoff:
            state = .waiting(notBefore: now)
            return []

        // One that counts as sent is still in its host's queue, or comes again from there.
        case (.released(let from, let isBlameless), .running) where from == fence:
            guard isBlameless else { return lose(now: now, policy: policy) }
            state = .waiting(notBefore: now)
            return []

        case (.unclaimed, .sent):
            return lose(now: now, policy: policy)

        case (.orphaned, .sent), (.orphaned, .running):
            state = .waiting(notBefore: now)
            return []

        case (.restart, _) where isEnded:
            (failures, losses, isUnswept) = (0, 0, false)
            state = .waiting(notBefore: now)
            return []

        case (.expire, _) where !isEnded:
            let isOut = if case .waiting = state { false } else { true }
            let code = MigrationError.Code.deadlineExceeded.rawValue
            state = .failed(code: code)
            return (isOut ? [.revoke(fence: fence)] : []) + [.finish(.failure(code: code))]

        case (.cancel, _) where !isEnded:
            isUnswept = fence > 0
            state = .cancelled
            return (isUnswept ? [.cancel(fence: fence)] : []) + [.finish(.failure(code: 1))]

        // It is over already: only what it kept for another attempt goes.
        case (.cancel, .failed) where fence > 0:
            isUnswept = true
            state = .cancelled
            return [.cancel(fence: fence)]

        default:
            return []
        }
    }

    private mutating func end(_ outcome: Outcome, now: Moment, policy: Policy) -> [Action] {
        guard case .failure(let code) = outcome else {
            state = .succeeded
            return [.finish(.success)]
        }
        failures += 1
        let retryable = MigrationError.Code(rawValue: code)?.isRetryable ?? false
        if retryable && failures < policy.maximumFailures {
            state = .waiting(notBefore: now + policy.pause(after: failures))
            return []
        }
        state = .failed(code: code)
        return [.finish(outcome)]
    }

    /// The first is made up for at once: workers are restarted, and hosts.
    private mutating func lose(now: Moment, policy: Policy) -> [Action] {
        losses += 1
        guard losses < policy.maximumLosses else {
            let code = MigrationError.Code.internal.rawValue
            state = .failed(code: code)
            return [.finish(.failure(code: code))]
        }
        state = .waiting(notBefore: now + (losses == 1 ? .zero : policy.pause(after: losses - 1)))
        return []
    }
}
