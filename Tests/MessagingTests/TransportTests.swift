import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import Synchronization
import TestKit
import Testing

/// A handler that does what its request says, through the generated service protocol.
private struct ScriptedConvert: ConvertService.ServiceProtocol {
    let transport: BusServerTransport

    func convert(
        request: ServerRequest<ConvertRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ConvertUpdate> {
        let call = try CallIdentity(request.metadata)
        return StreamingServerResponse { writer in
            switch request.message.domainName {
            case "fail":
                throw MigrationError(.dataLoss, "disk0: grain 7 is damaged", hint: "export it again")
            case "wait":
                try await writer.write(.with { $0.step.message = "waiting" })
                try await Task.sleep(for: .seconds(3600))
            case "permit":
                try await transport.permit("define-domain", for: call)
            default:
                for number in 1...3 { try await writer.write(.with { $0.progress.bytesDone = UInt64(number) }) }
            }
            try await writer.write(.with { $0.result.disks = [.with { $0.id = "disk0" }] })
            return [:]
        }
    }
}

/// A worker's transport with a scripted handler, and the coordinator's end of the bus.
private final class Rig: Sendable {
    let bus = InProcessBus()
    let names = Names()
    let ledger = MemoryLedger()
    let members = FleetMember.pair(host: "kvm1")
    let transport: BusServerTransport
    private let server: GRPCServer<BusServerTransport>
    private let serving: Mutex<Task<Void, any Error>?> = Mutex(nil)

    init(heartbeat: Duration = .seconds(10), lease: Duration = .seconds(60)) {
        transport = BusServerTransport(
            bus: bus, names: names, member: members.worker,
            settings: .init(slots: 2, heartbeat: heartbeat, leaseDuration: lease), ledger: ledger,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        server = GRPCServer(
            transport: transport, services: [ScriptedConvert(transport: transport)], interceptors: [ErrorInterceptor()])
    }

    /// Serves, hands the events to `body`, and ends.
    func run(_ body: (inout Events) async throws -> Void) async throws {
        try await bus.declare(names.topology(hosts: ["kvm1"]))
        let subscription = try await bus.subscribe(names.coordinatorEvents, prefetch: 1000)
        let serving = Task { try await server.serve() }
        var events = Events(subscription.deliveries.makeAsyncIterator(), members.coordinator)
        try await body(&events)
        transport.stopNow()
        try await serving.value
    }

    func send(
        _ script: String, task: String = "m-convert", fence: UInt64 = 1, host: String = "kvm1",
        deadline: Moment? = nil, method: String = "flotilla.v1.ConvertService/Convert", from sender: FleetMember? = nil,
        validity: Duration = .seconds(60), _ change: (inout Messaging.Message) -> Void = { _ in }
    ) async throws {
        let request = ConvertRequest.with { $0.domainName = script }
        let call = TaskCall(
            identity: CallIdentity(task: task, attempt: UInt32(fence), fence: fence), method: method, audience: host,
            deadline: deadline, body: try request.serializedBytes())
        var message = call.message(
            names, messageID: "\(task)-\(fence)", from: sender ?? members.coordinator, validity: validity)
        message.routingKey = "kvm1"
        change(&message)
        try await bus.publish(message)
    }

    func tell(_ control: ControlMessage) async throws {
        var message = Messaging.Message(
            exchange: names.control, routingKey: "kvm1",
            body: try ControlMessages.with { $0.messages = [control] }.serializedBytes())
        message.type = "flotilla.v1.ControlMessages"
        members.coordinator.sign(&message, for: "kvm1", validity: .seconds(60))
        try await bus.publish(message)
    }

    func deadLetter() async throws -> Messaging.Message? {
        let dead = try await bus.subscribe(names.dead, prefetch: 1)
        var iterator = dead.deliveries.makeAsyncIterator()
        let delivery = await iterator.next(isolation: #isolation)
        await delivery?.settle(.ack)
        dead.cancel()
        return delivery?.message
    }
}

private struct Events {
    var iterator: AsyncStream<Delivery>.Iterator
    let coordinator: FleetMember
    private var read: [WorkerEvent] = []

    init(_ iterator: AsyncStream<Delivery>.Iterator, _ coordinator: FleetMember) {
        self.iterator = iterator
        self.coordinator = coordinator
    }

    /// The next event of any kind.
    mutating func any() async throws -> WorkerEvent {
        while read.isEmpty {
            let next = await iterator.next(isolation: #isolation)
            let delivery = try #require(next)
            await delivery.settle(.ack)
            #expect(try coordinator.verify(delivery.message) == "kvm1")
            read = try WorkerEvents(serializedBytes: delivery.message.body).events
        }
        return read.removeFirst()
    }

    /// The next that is about a task.
    mutating func next() async throws -> TaskEvent {
        while true { if case .task(let event) = try await any().event { return event } }
    }

    mutating func rejected() async throws -> MessageRejected {
        while true { if case .rejected(let rejected) = try await any().event { return rejected } }
    }

    /// Skips to the first event of which `pick` makes something.
    mutating func first<Value>(_ pick: (TaskEvent) -> Value?) async throws -> Value {
        while true { if let value = pick(try await next()) { return value } }
    }

    mutating func accepted() async throws -> TaskEvent {
        try await first { if case .accepted = $0.kind { $0 } else { nil } }
    }

    mutating func ended() async throws -> TaskEnded {
        try await first { if case .ended(let ended) = $0.kind { ended } else { nil } }
    }

    mutating func update() async throws {
        _ = try await first { if case .update = $0.kind { true } else { nil } }
    }
}

@Suite(.timeLimit(.minutes(1))) struct TransportTests {
    @Test func taskRunsAndItsEventsAreNumbered() async throws {
        let rig = Rig()
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
        let rig = Rig()
        try await rig.run { events in
            try await rig.send("fail")
            let ended = try await events.ended()
            #expect(ended.code == Int32(MigrationError.Code.dataLoss.rawValue))
            #expect(ended.message == "disk0: grain 7 is damaged")
            #expect(ended.hint == "export it again")
            #expect(ended.result.isEmpty)
        }
    }

    enum Poison: String, CaseIterable {
        case undecodable, unsigned, forged, strangerKey, otherWorker, wrongHost, expired, fromTheFuture, oversized
        case unknownMethod, noAttempt, changedHeader, changedTask, replayed
    }

    /// What can't be right reaches the dead letters, its reason the coordinator, and the worker goes on.
    @Test(arguments: Poison.allCases)
    func poison(_ poison: Poison) async throws {
        let rig = Rig()
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
            } else if poison == .expired {
                #expect(try await events.ended().code == Int32(MigrationError.Code.unavailable.rawValue))
            }
            let rejected = try await events.rejected()
            #expect(rejected.reason.contains(reason), "\(rejected.reason)")
            #expect(rejected.queue == rig.names.tasks(of: "kvm1"))
            let letter = try #require(try await rig.deadLetter())
            #expect(letter.messageID == rejected.messageID)
            #expect(rig.ledger.admitted.count == admitted)
            try await rig.send("work")
            #expect(try await events.ended().code == 0)
        }
    }

    @Test func forgedControlMessagesChangeNothing() async throws {
        let rig = Rig()
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
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.cancel.reason = "real"
                })
            #expect(try await events.ended().message == "real")
        }
    }

    @Test func deadlineEndsTheTask() async throws {
        let rig = Rig()
        try await rig.run { events in
            try await rig.send("wait", deadline: Moment.now + .milliseconds(200))
            #expect(try await events.ended().code == Int32(MigrationError.Code.deadlineExceeded.rawValue))
        }
    }

    @Test func cancelEndsTheTaskWithTheReason() async throws {
        let rig = Rig()
        try await rig.run { events in
            try await rig.send("wait")
            try await events.update()
            // A cancel for another fence is not for this attempt.
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 99
                    $0.cancel.reason = "stale"
                })
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.cancel.reason = "no longer wanted"
                })
            let ended = try await events.ended()
            #expect(ended.code == Int32(MigrationError.Code.cancelled.rawValue))
            #expect(ended.message == "no longer wanted")
        }
    }

    @Test func newerFenceStopsTheOlderAttemptBeforeItRuns() async throws {
        let rig = Rig()
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
        let rig = Rig()
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
        let rig = Rig(heartbeat: .milliseconds(50), lease: .milliseconds(400))
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
        let rig = Rig(heartbeat: .milliseconds(50), lease: .milliseconds(300))
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
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.cancel.reason = "enough"
                })
            #expect(try await events.ended().message == "enough")
        }
    }

    @Test(arguments: [true, false]) func permit(_ granted: Bool) async throws {
        let rig = Rig()
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
        let rig = Rig()
        rig.ledger.answer("m-convert", .ended(.with { $0.message = "from before" }))
        try await rig.run { events in
            try await rig.send("fail", fence: 5)
            let event: TaskEvent = try await events.first { if case .ended = $0.kind { $0 } else { nil } }
            #expect(event.fence == 5)
            #expect(event.ended.message == "from before")
        }
    }

    @Test func unconfirmedResultsAreSaidAgainUntilTheyAreStored() async throws {
        let rig = Rig(heartbeat: .milliseconds(30))
        try await rig.run { events in
            try await rig.send("work")
            #expect(try await events.ended().code == 0)
            #expect(try await events.ended().code == 0)
            try await rig.tell(
                .with {
                    $0.taskID = "m-convert"
                    $0.fence = 1
                    $0.stored = ResultStored()
                })
            let forgotten = try await eventually { await rig.ledger.unacknowledged().isEmpty ? true : nil }
            #expect(forgotten == true)
        }
    }
}
