import FlotillaProtocol
import FoundationEssentials
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@Suite(.timeLimit(.minutes(1))) struct TransportTests {
    @Test func taskRunsAndItsEventsAreNumbered() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("work")
            var kinds: [String] = []
            for number in 1...6 {
                let event = try await events.next()
                #expect(event.seq == UInt64(number))
                #expect(event.fence == 1 && event.taskID == "m-convert")
                switch event.kind {
                case .accepted: kinds.append("accepted")
                case .update: kinds.append("update")
                case .ended(let ended):
                    kinds.append("ended")
                    #expect(ended.code == 0)
                    #expect(try ConvertUpdate(serializedBytes: ended.result).result.disks.map(\.id) == ["disk0"])
                default: Issue.record("unexpected \(event)")
                }
            }
            #expect(kinds == ["accepted", "update", "update", "update", "update", "ended"])
        }
    }

    @Test func handlersErrorKeepsCodeWordsAndHint() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("fail")
            let ended = try await events.ended()
            #expect(ended.code == Int32(MigrationError.Code.dataLoss.rawValue))
            #expect(ended.message == "disk0: grain 7 is damaged")
            #expect(ended.hint == "export it again")
            #expect(ended.result.isEmpty)
        }
    }

    @Test func deadlineEndsTheTask() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("wait", deadline: Moment.now + .milliseconds(200))
            #expect(try await events.ended().code == Int32(MigrationError.Code.deadlineExceeded.rawValue))
        }
    }

    @Test func cancelEndsTheTaskWithTheReason() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            // A cancel for another fence is not for this attempt.
            try await rig.cancel(fence: 99, "stale")
            try await rig.cancel(fence: 1, "no longer wanted")
            let ended = try await events.ended()
            #expect(ended.code == Int32(MigrationError.Code.cancelled.rawValue))
            #expect(ended.message == "no longer wanted")
        }
    }

    @Test func whoDoesNotStopIsNamed() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("deaf")
            try await events.update()
            #expect(rig.transport.pretence(longestStop: .zero) == nil)
            try await rig.cancel(fence: 1, "no longer wanted")
            let named = try await eventually { rig.transport.pretence(longestStop: .milliseconds(50)) }
            #expect(named?.contains("m-convert") == true && named?.contains("no longer wanted") == true)
            #expect(rig.transport.pretence(longestStop: .seconds(60)) == nil)
            _ = try await events.ended()
            #expect(try await eventually { rig.transport.pretence(longestStop: .zero) == nil ? true : nil } == true)
        }
    }

    @Test func lateCopyOfARunningTaskDoesNotEndIt() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            try await rig.send("wait", validity: .seconds(-1))
            // Whatever is said of the copy is said before it gets there.
            _ = try #require(try await rig.deadLetter())
            try await rig.cancel(fence: 1, "no longer wanted")
            let ended = try await events.ended()
            #expect(ended.code == Int32(MigrationError.Code.cancelled.rawValue))
            #expect(ended.message == "no longer wanted")
        }
    }

    @Test func cancelBetweenAttemptsCleansUp() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("fail")
            _ = try await events.ended()
            // Not as long as its end is to be confirmed. That is published before the attempt is over.
            try await rig.cancel(fence: 1, "no longer wanted")
            let isDiscarded = try await eventually {
                // Either is passed over while the other is seen to; a coordinator says both again.
                try await rig.confirm(fence: 1)
                try await rig.cancel(fence: 1, "no longer wanted")
                return rig.ledger.discarded.isEmpty ? nil : true
            }
            #expect(isDiscarded == true)
            let ended: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(ended.fence == 1 && ended.ended.message == "no longer wanted")
            #expect(ended.ended.code == Int32(MigrationError.Code.cancelled.rawValue))
        }
    }

    @Test func lateCopyOfAnEndedTaskDoesNotTakeThePlaceOfItsResult() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("work")
            #expect(try await events.ended().code == 0)
            try await rig.send("work", validity: .seconds(-1))
            _ = try #require(try await rig.deadLetter())
            try await rig.send("fail", task: "other-convert")
            let event: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(event.taskID == "other-convert")
        }
    }

    @Test func newerFenceStopsTheOlderAttemptBeforeItRuns() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("wait", fence: 1)
            try await events.update()
            try await rig.send("work", fence: 2)
            // The older attempt says nothing more: the next end is the newer one's.
            let event: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(event.fence == 2)
            #expect(event.ended.code == 0)
            // A late copy of the first is dropped.
            try await rig.send("work", fence: 1)
            try await rig.send("work", task: "other-convert", fence: 1)
            #expect(try await events.accepted().taskID == "other-convert")
        }
    }

    @Test func attemptsThatArriveTogetherNeverRunTogether() async throws {
        let rig = TransportRig()
        for fence in 1...20 {
            try await rig.bus.declare(rig.names.topology(hosts: ["kvm1"]));
            try await rig.send("work", fence: UInt64(fence))
        }
        try await rig.run { events in
            var running: UInt64?
            while true {
                let event = try await events.next()
                switch event.kind {
                case .accepted:
                    // Accepted only after the one before was out of the way: fences never step back.
                    #expect(event.fence > running ?? 0)
                    running = event.fence
                case .ended where event.fence == 20: return
                default: #expect(event.fence == running)
                }
            }
        }
    }

    @Test func leaseThatIsNotRenewedStopsTheTaskInSilence() async throws {
        let rig = TransportRig(heartbeat: .milliseconds(50), lease: .milliseconds(400))
        try await rig.run { events in
            try await rig.send("wait", task: "lost-convert")
            try await events.update()
            // Slot and task are free again without an end having been said: the next attempt is accepted and runs.
            try await rig.send("work", task: "lost-convert", fence: 2)
            let event: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(event.fence == 2)
        }
    }

    @Test func heartbeatRenewsTheLease() async throws {
        let rig = TransportRig(heartbeat: .milliseconds(50), lease: .milliseconds(300))
        try await rig.run { events in
            try await rig.send("wait")
            let started = ContinuousClock.now
            while ContinuousClock.now < started + .milliseconds(900) {
                let event = try await events.next()
                guard case .heartbeat = event.kind else { continue }
                try await rig.tell(
                    .with {
                        $0.taskID = event.taskID
                        $0.fence = event.fence
                        $0.lease = .with {
                            $0.answersSeq = event.seq
                            $0.ttlMs = 300
                        }
                    })
            }
            // Well past the first lease it still runs, and can be cancelled.
            try await rig.cancel(fence: 1, "enough")
            #expect(try await events.ended().message == "enough")
        }
    }

    @Test(arguments: [true, false]) func permit(_ granted: Bool) async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("permit")
            let step = try await events.first { if case .permit(let permit) = $0.kind { permit.step } else { nil } }
            #expect(step == "define-domain")
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.permit = .with {
                        $0.step = step
                        $0.granted = granted
                        $0.reason = granted ? "" : "fence 2 owns the task"
                    }
                })
            let ended = try await events.ended()
            #expect(ended.code == (granted ? 0 : Int32(MigrationError.Code.aborted.rawValue)))
            if !granted { #expect(ended.message.contains("fence 2 owns the task")) }
        }
    }

    @Test func storedResultIsAnsweredWithoutRunning() async throws {
        let rig = TransportRig()
        rig.ledger.answer("m-convert", .ended(.with { $0.message = "from before" }))
        try await rig.run { events in
            try await rig.send("fail", fence: 5)
            let event: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(event.fence == 5)
            #expect(event.ended.message == "from before")
        }
    }

    @Test func unconfirmedResultsAreSaidAgainUntilTheyAreStored() async throws {
        let rig = TransportRig(heartbeat: .milliseconds(30))
        try await rig.run { events in
            try await rig.send("work")
            #expect(try await events.ended().code == 0)
            #expect(try await events.ended().code == 0)
            try await rig.confirm(fence: 1)
            let forgotten = try await eventually { await rig.ledger.unacknowledged().isEmpty ? true : nil }
            #expect(forgotten == true)
        }
    }

    /// The coordinator gives tasks up that a living worker does not take on.
    @Test func whoDrainsKeepsItsTasksAndDoesNotCountAsAlive() async throws {
        let rig = TransportRig(heartbeat: .milliseconds(30))
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            rig.transport.beginGracefulShutdown()
            var (beats, isAlive) = (0, false)
            // The first may have been under way.
            while beats < 4 {
                switch try await events.any().event {
                case .task(let event) where event.kind == .heartbeat(TaskHeartbeat()): beats += 1
                case .heartbeat: isAlive = isAlive || beats > 2
                default: break
                }
            }
            #expect(!isAlive)
        }
    }
}
