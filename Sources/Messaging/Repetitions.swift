package import FlotillaProtocol

/// When results that were not confirmed are said again: after a pause that doubles with each time. A coordinator that is
/// away for hours finds a few copies of each, not thousands.
package struct Repetitions {
    private struct Turn {
        let fence: UInt64
        var at: ContinuousClock.Instant
        var pause: Duration
    }

    /// Of the pauses.
    package static let longest = Duration.seconds(600)

    private let first: Duration
    private var turns: [String: Turn] = [:]

    package init(first: Duration) { self.first = first }

    /// It could not be said: its turn is now, and its pauses begin anew.
    package mutating func failed(_ event: TaskEvent, now: ContinuousClock.Instant) {
        guard turns[event.taskID]?.fence == event.fence else { return }
        turns[event.taskID] = Turn(fence: event.fence, at: now, pause: first)
    }

    /// Those whose turn it is of all that wait now. The others are forgotten.
    package mutating func due(_ waiting: [TaskEvent], now: ContinuousClock.Instant) -> [TaskEvent] {
        let earlier = turns
        turns = [:]
        return waiting.filter { event in
            var turn = Turn(fence: event.fence, at: now, pause: first)
            if let known = earlier[event.taskID], known.fence == event.fence { turn = known }
            let isDue = turn.at <= now
            if isDue {
                turn.at = now + turn.pause
                turn.pause = min(turn.pause * 2, Self.longest)
            }
            turns[event.taskID] = turn
            return isDue
        }
    }
}
