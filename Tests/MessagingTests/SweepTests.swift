import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// Cleaning up after a task on a disk that does not answer.
@Suite struct SweepTests {
    private func inATransport(_ body: (TransportRig, inout Events) async throws -> Void) async throws {
        let rig = TransportRig()
        defer { rig.ledger.letGo() }
        try await rig.run { events in
            rig.ledger.hold("left-convert")
            try await rig.cancel("left-convert", fence: 1, "no longer wanted")
            #expect(try await eventually { rig.ledger.waiting == 1 ? true : nil } == true)
            try await body(rig, &events)
        }
    }

    @Test func aSweepThatHangsKeepsNoPermitWaiting() async throws {
        try await inATransport { rig, events in
            try await rig.send("permit")
            _ = try await events.first { if case .permit = $0.kind { true } else { nil } }
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.permit = .with {
                        $0.step = "define-domain"
                        $0.granted = true
                    }
                })
            #expect(try await events.ended().code == 0)
            #expect(rig.ledger.discarded.isEmpty)
        }
    }

    /// Nor one more for each time that it is asked for.
    @Test func anAttemptBeginsAfterTheSweepOfItsTask() async throws {
        try await inATransport { rig, events in
            try await rig.cancel("left-convert", fence: 1, "no longer wanted")
            try await rig.send("work", task: "left-convert", fence: 2)
            try await rig.send("work")
            #expect(try await events.accepted().taskID == "m-convert")
            #expect(try await events.ended().code == 0)
            #expect(rig.ledger.admitted.map(\.identity.task) == ["m-convert"])
            rig.ledger.letGo()
            #expect(try await events.ended().code == Int32(MigrationError.Code.cancelled.rawValue))
            #expect(try await events.accepted().taskID == "left-convert")
            #expect(rig.ledger.discarded == ["left-convert"])
            #expect(try await events.ended().code == 0)
        }
    }

    /// All slots may be taken by conversions for hours.
    @Test(.timeLimit(.minutes(1))) func whatIsPromptWaitsForNoOther() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            for number in 1...3 { try await rig.send("wait", task: "m\(number)-convert") }
            for _ in 1...2 { try await events.update() }
            try await rig.send(
                "", task: "m-undeploy",
                method: DeployService.Method.Undeploy.descriptor.fullyQualifiedMethod)
            let first: TaskEvent = try await events.first { event in
                switch event.kind {
                case .update, .ended: event
                default: nil
                }
            }
            #expect(first.taskID == "m-undeploy" && first.ended.code == 0)
        }
    }

    /// A deadline passes for a task that has no slot yet, too.
    @Test func deadlineEndsATaskThatWaitsForItsTurn() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            for number in 1...2 {
                try await rig.send("wait", task: "m\(number)-convert")
                try await events.update()
            }
            try await rig.send("wait", deadline: Moment.now + .milliseconds(200))
            let ended: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(ended.taskID == "m-convert")
            #expect(ended.ended.code == Int32(MigrationError.Code.deadlineExceeded.rawValue))
        }
    }
}
