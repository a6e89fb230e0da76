import FlotillaProtocol
import FoundationEssentials
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@Suite(.timeLimit(.minutes(1))) struct PoisonTests {
    enum Poison: String, CaseIterable {
        case undecodable, unsigned, forged, strangerKey, otherWorker, wrongHost, expired, fromTheFuture, oversized
        case unknownMethod, noRequest, noAttempt, changedHeader, changedTask, replayed
    }

    /// What can't be right reaches the dead letters, its reason the coordinator, and the worker goes on.
    @Test(arguments: Poison.allCases)
    func poison(_ poison: Poison) async throws {
        let rig = TransportRig()
        try await rig.run { events in
            var reason = "not signed"
            var admitted = 0
            switch poison {
            case .undecodable:
                try await rig.bus.publish(
                    Messaging.Message(exchange: rig.names.tasks, routingKey: "kvm1", body: [0xff]))
            case .unsigned: try await rig.send("work") { $0.headers[Messaging.Message.signatureHeader] = nil }
            case .forged:
                try await rig.send("work") { $0.body.append(0) }
                reason = "signature"
            case .changedHeader:
                try await rig.send("work") { $0.headers["flotilla-fence"] = .integer(99) }
                reason = "signature"
            case .changedTask:
                try await rig.send("work") { $0.correlationID = "other-convert" }
                reason = "signature"
            case .strangerKey:
                try await rig.send("work", from: FleetMember.pair(host: "kvm1").coordinator)
                reason = "does not believe"
            case .otherWorker:
                try await rig.send("work", from: rig.members.worker)
                reason = "does not believe"
            case .wrongHost:
                try await rig.send("work", host: "kvm2")
                reason = "addressed to kvm2"
            case .expired:
                try await rig.send("work", validity: .seconds(-1))
                reason = "validity ended"
            case .fromTheFuture:
                try await rig.send("work") {
                    rig.members.coordinator.sign(
                        &$0, for: "kvm1", validity: .seconds(60), now: .now + .seconds(120))
                }
                reason = "in the future"
            case .oversized:
                // No bus takes it from an honest publisher; a dishonest one may have no such limit.
                var message = Messaging.Message(
                    exchange: rig.names.tasks, routingKey: "kvm1",
                    body: [UInt8](repeating: 0, count: Messaging.Message.maximumBody))
                message.type = "/flotilla.v1.ConvertService/Convert"
                try await rig.bus.publish(message)
            case .unknownMethod:
                try await rig.send("work", method: "flotilla.v1.ConvertService/Explode")
                reason = "not served here"
            case .noRequest:
                try await rig.send("work") {
                    $0.body = [0xff]
                    rig.members.coordinator.sign(&$0, for: "kvm1", validity: .seconds(60))
                }
                reason = ""
            case .noAttempt:
                try await rig.send("work") {
                    $0.headers["flotilla-attempt"] = nil
                    rig.members.coordinator.sign(&$0, for: "kvm1", validity: .seconds(60))
                }
                reason = "flotilla-attempt"
            case .replayed:
                try await rig.send("work", task: "m-export", fence: 2)
                #expect(try await events.ended().code == 0)
                try await rig.send("work", task: "m-export", fence: 1)
                reason = "replay"
                admitted = 1
            }
            if poison == .unknownMethod {
                // The sender is known: it is told.
                #expect(try await events.ended().code == Int32(MigrationError.Code.unimplemented.rawValue))
            } else if poison == .noRequest {
                #expect(try await events.ended().code == Int32(MigrationError.Code.internal.rawValue))
            } else if poison == .expired {
                #expect(try await events.ended().code == Int32(MigrationError.Code.unavailable.rawValue))
            }
            let rejected = try await events.rejected()
            #expect(reason.isEmpty || rejected.reason.contains(reason), "\(rejected.reason)")
            #expect(rejected.queue == rig.names.tasks(of: "kvm1"))
            let letter = try #require(try await rig.deadLetter())
            #expect(letter.messageID == rejected.messageID)
            #expect(rig.ledger.admitted.count == admitted)
            try await rig.send("work")
            #expect(try await events.ended().code == 0)
        }
    }

    @Test(arguments: ["", "..", "a/b"]) func controlMessagesOfNoTaskAreRefused(_ task: String) async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.tell(
                .with {
                    $0.taskID = task
                    $0.fence = 1
                    $0.cancel.reason = "no longer wanted"
                })
            #expect(try await events.rejected().reason.contains("names no task"))
            #expect(rig.ledger.discarded.isEmpty)
        }
    }

    @Test func forgedControlMessagesChangeNothing() async throws {
        let rig = TransportRig()
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            let cancel = ControlMessages.with {
                $0.messages = [
                    .with {
                        $0.taskID = "m-convert"
                        $0.fence = 1
                        $0.cancel.reason = "forged"
                    }
                ]
            }
            try await rig.bus.publish(
                Messaging.Message(
                    exchange: rig.names.control, routingKey: "kvm1", body: try cancel.serializedBytes()))
            #expect(try await events.rejected().queue == rig.names.control(of: "kvm1"))
            let letter = try #require(try await rig.deadLetter())
            #expect(letter.headers[Messaging.Message.Death.queue]?.string == rig.names.control(of: "kvm1"))
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.cancel.reason = "real"
                })
            #expect(try await events.ended().message == "real")
        }
    }
}
