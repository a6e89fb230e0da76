import Coordinator
import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// What the coordinator makes of hosts: whom it believes, who is alive, who gets tasks.
@Suite(.timeLimit(.minutes(1))) struct HostTests {
    /// Whoever looks at dead letters takes them for a moment.
    @Test func letterInOtherHandsIsDiscardedOnceItIsBack() async throws {
        let rig = try Rig()
        let bus = WatchedBus()
        try await rig.process(on: bus) { client, worker in
            _ = try await client.submitMigration(Rig.request)
            try await worker.forge(.ended(.with { $0.code = 15 }), of: try await worker.take())
            let (letter, hands) = try await worker.holdDeadLetter()
            async let discarded = client.replay([letter.messageID], discards: true)
            #expect(try await eventually { bus.looks(through: Names().dead) > 0 ? true : nil } == true)
            hands.cancel()
            #expect(try await discarded.letters.map(\.fate) == [.discarded])
            let missed = try await client.replay(["no-such"], discards: true)
            #expect(missed.letters.map(\.messageID) == ["no-such"] && missed.letters[0].fate == .missing)
        }
    }

    /// Its clock was a day ahead, and the coordinator's too, when it told of itself.
    @Test func whatAHostSaysIsHeardAfterItsClockWasPutRight() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            for (age, pool) in [(-86_400_000, "future"), (0, "now"), (1_000, "late")] as [(Int64, String)] {
                worker.profile.capturedAt = Moment(milliseconds: Moment.now.milliseconds - age).timestamp
                worker.profile.pools[0].name = pool
                try await worker.announce()
                let expected = pool == "late" ? "now" : pool
                let heard = try await eventually {
                    let profile = try await client.listHosts(.init()).hosts.first?.profile
                    return profile?.pools.first?.name == expected ? true : nil
                }
                #expect(heard == true, "\(pool)")
            }
        }
    }

    /// Of a host and an attempt that do not own the task nothing is told.
    @Test func progressIsItsOwners() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            let call = try await worker.take()
            try await worker.accept(call)
            let (begun, begin) = AsyncStream<Void>.makeStream()
            async let steps = client.watchMigration(.with { $0.id = id }) { response in
                var steps: [String] = []
                for try await event in response.messages {
                    begin.yield()
                    if case .step(let step) = event.event { steps.append(step.step.message) }
                }
                return steps
            }
            for await _ in begun { break }
            for (fence, words) in [(99, "strange"), (call.identity.fence, "own")] as [(UInt64, String)] {
                let identity = CallIdentity(task: call.identity.task, attempt: 1, fence: fence)
                let speaker = TaskCall(identity: identity, method: call.method, audience: Rig.host, body: [])
                let update: Data = try ExportUpdate.with { $0.step.message = words }.serializedBytes()
                try await worker.say(speaker, .update(update))
            }
            try await worker.fail(call, .notFound, "the source is gone")
            #expect(try await steps == ["own"])
        }
    }

    /// A broker deletes the control queue of a host that is long away.
    @Test func hostsQueuesAreDeclaredAgain() async throws {
        let rig = try Rig()
        let bus = WatchedBus()
        var settings = Coordinator.Settings()
        settings.hostInterval = .milliseconds(5)
        settings.queueInterval = .milliseconds(20)
        let coordinator = Coordinator(
            store: try SQLiteStore(path: "\(rig.folder.path)/store.sqlite"), bus: bus, member: rig.members.coordinator,
            settings: settings, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let running = Task { try await coordinator.run { [Rig.host] } }
        let control = settings.names.control(of: Rig.host)
        // Twice for the start, then again and again.
        let isDeclared = try await eventually { bus.declarations(of: control) > 3 ? true : nil }
        running.cancel()
        _ = await running.result
        #expect(isDeclared == true)
    }

    @Test func aQueueThatSomebodyElseMadeIsItsHostsTroubleAlone() async throws {
        let rig = try Rig()
        let names = Names()
        let bus = WatchedBus(strange: names.tasks(of: "kvm0"))
        let coordinator = Coordinator(
            store: try SQLiteStore(path: "\(rig.folder.path)/store.sqlite"), bus: bus, member: rig.members.coordinator,
            settings: .init(names: names), logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let running = Task { try await coordinator.run { ["kvm0", Rig.host] } }
        let isDeclared = try await eventually { bus.declarations(of: names.tasks(of: Rig.host)) > 1 ? true : nil }
        running.cancel()
        _ = await running.result
        #expect(isDeclared == true)
    }

    @Test func forgedEventsReachTheDeadLettersAndChangeNothing() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.forge(.ended(.with { $0.code = 15 }), of: export)
            #expect(try await worker.deadLetter()?.type == "flotilla.v1.WorkerEvents")
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            try await worker.work(.convert)
            try await worker.work(.deploy)
            #expect(try await client.end(migration.id).state == .done)
        }
        let noted = try await SQLiteStore(path: "\(rig.folder.path)/store.sqlite").write { try $0.rejections(limit: 9) }
        #expect(noted.map(\.member) == ["coordinator"])
        #expect(noted.first?.rejected.reason.contains("does not believe") == true)
    }

    /// A worker's nonsense ends its own migration and nothing else.
    @Test func resultThatCannotBeReadFailsTheMigration() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.say(export, .ended(.with { $0.result = Data([0xff, 0xff]) }))
            let ended = try await client.end(migration.id)
            #expect(ended.state == .failed)
            #expect(ended.errorMessage.contains("export") && !ended.errorHint.isEmpty)
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
        }
    }

    /// A message that a queue lost is made up for once its host shows that it lives, and not before.
    @Test func sentTaskThatNobodyTakesOnIsSentAgain() async throws {
        var rig = try Rig(policy: .init(backoff: .milliseconds(1), maximumLosses: 1000))
        rig.acceptanceTimeout = .zero
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let lost = try await worker.take()
            // Not before the store knows that it was sent.
            _ = try await eventually {
                try await worker.heartbeat()
                return try await client.attempt(of: migration.id) > 1 ? true : nil
            }
            // What is said after them is heard after all heartbeats.
            worker.profile.cpus = 33
            try await worker.announce()
            _ = try await eventually { try await client.listHosts(.init()).hosts[0].profile.cpus == 33 ? true : nil }
            let attempt = try #require(
                try await eventually {
                    let export = try await client.getMigration(.with { $0.id = migration.id }).stages[0]
                    return export.state == "sent" ? export.attempt : nil
                })
            #expect(attempt > 1)
            var again = try await worker.take()
            while again.identity.attempt < attempt { again = try await worker.take() }
            #expect(again.identity.task == lost.identity.task)
            #expect(again.identity.fence > lost.identity.fence)
            try await worker.accept(again)
            _ = try await worker.told { if case .lease = $0.kind { true } else { nil } }
            // What was taken on is not sent a third time.
            try await worker.heartbeat()
            try await worker.succeed(again, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            try await worker.work(.convert)
        }
    }

    /// The first may have been lost with the coordinator, or with the worker.
    @Test func cancelIsSaidAgainToWhoeverLivesUntilNothingIsLeft() async throws {
        let rig = try Rig(policy: .init(backoff: .seconds(3600)))
        let isCancel = { (control: ControlMessage) -> Bool? in if case .cancel = control.kind { true } else { nil } }
        var between: TaskCall?
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let call = try await worker.take()
            try await worker.accept(call)
            try await worker.fail(call, .unavailable, "the source is away")
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            #expect(try await client.cancelMigration(.with { $0.id = migration.id }).state == .cancelled)
            between = call
        }
        try await rig.process { client, worker in
            let call = try #require(between)
            try await worker.heartbeat()
            _ = try await worker.told(isCancel)
            try await worker.fail(call, .cancelled, "nothing is left")
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            try await worker.heartbeat()
            // What is said after the heartbeat is answered after it.
            try await worker.fail(call, .cancelled, "nothing is left")
            let isCancelled = try await worker.told { control -> Bool? in
                switch control.kind {
                case .cancel: true
                case .stored: false
                default: nil
                }
            }
            #expect(!isCancelled)
        }
    }

    /// Its queue may have lost its majority.
    @Test func hostWhoseQueueTakesNothingKeepsNoOtherWaiting() async throws {
        let rig = try Rig()
        let bus = WatchedBus(stalled: "kvm2")
        let store = try SQLiteStore(path: "\(rig.folder.path)/store.sqlite")
        try await store.write { store in
            for number in 0...600 {
                try store.enqueue(
                    OutboxRecord(
                        id: "\(number)", identity: CallIdentity(task: "\(number)", attempt: 1, fence: 1),
                        method: "flotilla.v1.ExportService/Export", host: number < 600 ? "kvm2" : "kvm1", body: [1]))
            }
        }
        let keys = ["kvm1", "kvm2"].map { ($0, [SigningKey().publicKey]) }
        let member = FleetMember(
            name: FleetMember.coordinator, key: SigningKey(), believes: KeyRing(Dictionary(uniqueKeysWithValues: keys)))
        let coordinator = Coordinator(
            store: store, bus: bus, member: member,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        try await bus.declare(Names().topology(hosts: ["kvm1", "kvm2"]))
        var tasks = try await bus.subscribe(Names().tasks(of: "kvm1"), prefetch: 1).deliveries.makeAsyncIterator()
        let running = Task { try await coordinator.run { ["kvm1", "kvm2"] } }
        #expect(await tasks.next(isolation: #isolation)?.message.messageID == "600")
        let left = try await eventually {
            let left = try await store.write { try $0.unsent(limit: 1000, except: []).map(\.host) }
            return left.count == 600 ? Set(left) : nil
        }
        #expect(left == ["kvm2"])
        running.cancel()
        _ = await running.result
    }

    /// A lease runs out, or a deadline passes, while the broker is away: a renewal, or the result, may wait there.
    @Test(arguments: [false, true]) func nobodyIsGivenUpWhileNobodyCanBeHeard(_ hasDeadline: Bool) async throws {
        let rig = try Rig()
        let store = try SQLiteStore(path: "\(rig.folder.path)/store.sqlite")
        let past = Moment.now - .seconds(120)
        let id = Stage.export.taskID(ofMigration: "m1")
        try await store.write { store in
            try store.save(
                MigrationRecord(
                    id: "m1", key: "m1", request: Rig.request, state: .exporting, createdAt: past, updatedAt: past))
            var task = TaskRecord(migrationID: "m1", stage: .export, host: Rig.host, request: [], now: past)
            task.machine = TaskMachine(
                state: .running(leaseUntil: hasDeadline ? .now + .seconds(30) : past), attempt: 1, fence: 1,
                failures: 0,
                losses: 0, isUnswept: false)
            task.deadline = hasDeadline ? past : nil
            try store.save(task)
        }
        let bus = WatchedBus()
        let events = Names().coordinatorEvents
        func hear(_ connected: Moment, _ consumes: Moment?) {
            bus.set(
                BusStatus(
                    connections: [.init(name: "consume", state: .connected(since: connected))],
                    consumers: [.init(queue: events, activeSince: consumes)]))
        }
        hear(past, nil)
        var settings = Coordinator.Settings(tick: .milliseconds(2))
        settings.policy.leaseDuration = .seconds(60)
        let coordinator = Coordinator(
            store: store, bus: bus, member: rig.members.coordinator, settings: settings,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        let running = Task { try await coordinator.run { [Rig.host] } }
        let silences: [(Moment, Moment?)] = [(past, nil), (past, .now), (.now, past)]
        for (connected, consumes) in silences {
            hear(connected, consumes)
            #expect(try await eventually { bus.looks > 5 ? true : nil } == true)
            let task = try await store.write { try $0.task(id: id) }
            #expect(task?.machine.attempt == 1 && task?.machine.isEnded == false)
        }
        // Since long, or since a moment that the clock was set back from.
        hear(past, .now + .seconds(3600))
        let isLost = try await eventually {
            let machine = try await store.write { try $0.task(id: id)?.machine }
            return hasDeadline ? machine?.state == .failed(code: 4) ? true : nil : machine?.fence == 2 ? true : nil
        }
        #expect(isLost == true)
        running.cancel()
        _ = await running.result
    }

    @Test func silenceOfATaskIsTold() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            let export = try await worker.take()
            try await worker.accept(export)
            func told(_ seconds: UInt32) async throws -> Bool {
                try await eventually {
                    let migrations =
                        try await client.listMigrations(.init()).migrations
                        + [try await client.getMigration(.with { $0.id = id })]
                    return migrations.allSatisfy { $0.stages[0].secondsWithoutProgress == seconds } ? true : nil
                } == true
            }
            for seconds in [1020, 0, 900] as [UInt32] {
                try await worker.say(export, .heartbeat(.with { $0.secondsWithoutProgress = seconds }))
                #expect(try await told(seconds))
            }
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            #expect(try await told(0))
        }
    }

    /// Or nothing would ever leave a host before it is switched off. The second attempt is one that waited.
    @Test func drainedHostTakesBackWhatItHas() async throws {
        let rig = try Rig(policy: .init(backoff: .milliseconds(1)))
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            for stage in Stage.way { try await worker.work(stage) }
            #expect(try await client.end(migration.id).state == .done)
            _ = try await client.drainHost(.with { $0.name = Rig.host })
            _ = try await client.rollbackMigration(.with { $0.id = migration.id })
            let first = try await worker.take()
            #expect(first.identity.task == Stage.undeploy.taskID(ofMigration: migration.id))
            try await worker.accept(first)
            try await worker.fail(first, .unavailable, "libvirt is away")
            try await worker.work(.undeploy)
            #expect(try await client.end(migration.id).state == .rolledBack)
        }
    }

    @Test func drainedHostGetsNoNewTasks() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.take()
            try await worker.accept(export)
            let host = try await client.drainHost(.with { $0.name = Rig.host })
            #expect(host.drained && host.tasks == 1 && host.hasSeenAt)
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            #expect(try await client.listHosts(.init()).hosts.map(\.tasks) == [0])
            let waiting = try await client.getMigration(.with { $0.id = migration.id }).stages
            #expect(waiting.map(\.state) == ["succeeded", "waiting"])
            #expect(try await client.drainHost(.with { ($0.name, $0.undrain) = (Rig.host, true) }).drained == false)
            try await worker.work(.convert)
        }
        await #expect(throws: (any Error).self) {
            try await rig.process { client, _ in _ = try await client.drainHost(.with { $0.name = "nobody" }) }
        }
    }
}
