import FlotillaProtocol
import Messaging
import SwiftProtobuf
import Testing

@Suite struct RepetitionsTests {
    private func event(_ task: String, fence: UInt64 = 1) -> TaskEvent {
        .with { ($0.taskID, $0.fence) = (task, fence) }
    }

    @Test func pausesDoubleUpToTheLongest() {
        let start = ContinuousClock.now
        var repetitions = Repetitions(first: .seconds(10))
        var said: [Int64] = []
        for second in 0..<(24 * 3600) where !repetitions.due([event("a")], now: start + .seconds(second)).isEmpty {
            said.append(Int64(second))
        }
        #expect(said.prefix(8) == [0, 10, 30, 70, 150, 310, 630, 1230])
        #expect(zip(said.dropFirst(8), said.dropFirst(7)).allSatisfy { $0 - $1 == 600 })
    }

    @Test func whatCouldNotBeSaidKeepsItsTurn() {
        let start = ContinuousClock.now
        var repetitions = Repetitions(first: .seconds(10))
        for second in stride(from: 0, to: 600, by: 10) {
            #expect(repetitions.due([event("a")], now: start + .seconds(second)).count == 1)
            repetitions.failed(event("a"), now: start + .seconds(second + 1))
        }
        // Of a result that is not the one.
        repetitions.failed(event("a", fence: 2), now: start + .seconds(600))
        #expect(repetitions.due([event("a")], now: start + .seconds(600)).count == 1)
        #expect(repetitions.due([event("a")], now: start + .seconds(609)).isEmpty)
        #expect(repetitions.due([event("a")], now: start + .seconds(610)).count == 1)
    }

    @Test func eachResultHasItsOwnTurn() {
        let start = ContinuousClock.now
        var repetitions = Repetitions(first: .seconds(10))
        func said(_ events: [TaskEvent], _ second: Int) -> [String] {
            repetitions.due(events, now: start + .seconds(second)).map { "\($0.taskID)\($0.fence)" }
        }
        #expect(said([event("a")], 0) == ["a1"])
        #expect(said([event("a"), event("b")], 5) == ["b1"])
        #expect(said([event("a"), event("b")], 10) == ["a1"])
        // Another attempt's result is another one.
        #expect(said([event("a", fence: 2), event("b")], 11) == ["a2"])
        // What was confirmed is forgotten.
        #expect(said([], 12) == [])
        #expect(said([event("b")], 12) == ["b1"])
    }
}
