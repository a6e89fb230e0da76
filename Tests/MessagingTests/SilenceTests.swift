import FlotillaProtocol
import MigrationModel
import TestKit
import Testing

@testable import Messaging

/// A handler that hangs keeps its lease: somebody has to be told.
@Suite(.timeLimit(.minutes(1))) struct SilenceTests {
    @Test func isSaidAtTheLimitAndWhenItHasDoubled() {
        let call = RunningCall(CallIdentity(task: "m-convert", attempt: 1, fence: 1), lease: .seconds(60))
        let start = ContinuousClock.now
        func said(after minutes: Int) -> Bool? {
            call.silence(of: .seconds(900), now: start + .seconds(minutes * 60))?.isNews
        }
        // It waits for its turn.
        #expect(said(after: 600) == nil)
        call.noteProgress(now: start)
        #expect([14, 15, 16, 29, 30, 59, 60, 61].map(said) == [nil, true, false, false, true, false, true, false])
        call.noteProgress(now: start + .seconds(3600))
        #expect([70, 75, 76].map(said) == [nil, true, false])
        call.noteProgress(isOver: true)
        #expect(said(after: 600) == nil)
    }

    @Test func travelsWithTheHeartbeat() async throws {
        let rig = TransportRig(heartbeat: .milliseconds(50), silenceLimit: .seconds(1))
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            func seconds(_ event: TaskEvent) -> UInt32? {
                if case .heartbeat(let beat) = event.kind { beat.secondsWithoutProgress } else { nil }
            }
            #expect(try await events.first(seconds) == 0)
            while try await events.first(seconds) == 0 {}
            try await rig.cancel(fence: 1, "no longer wanted")
            #expect(try await events.ended().code == Int32(MigrationError.Code.cancelled.rawValue))
        }
    }
}
