import FlotillaProtocol
import FoundationEssentials
import HostKit
package import Logging
package import Messaging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// Decides who does what: turns migrations into tasks, publishes them from the outbox, takes the workers' events and
/// moves each migration on. All decisions are made inside store transactions; a crash between any two lines leaves a
/// store that the next start continues from.
///
/// Start reading at `handle(_:)` for what workers say, and at `Transitions` for what follows from it.
package final class Coordinator: Sendable {
    package struct Settings: Sendable {
        package var names: Names
        package var policy: TaskMachine.Policy
        /// How often waits and leases are looked at.
        package var tick: Duration
        /// Leave migrations alone until somebody submits them in this process. For one machine, where a command is
        /// about what it names and about nothing else that the store holds.
        package var startsOnlySubmitted: Bool
        /// How long a task may wait in its host's queue before it needs another signature, i.e. another attempt.
        package var taskValidity = Duration.seconds(24 * 3600)
        /// Broker users who may ask for migrations on the requests' queue. With none the queue isn't served, and nobody
        /// is notified of anything.
        package var requesters: Set<String> = []
        /// How often hosts that joined are looked for.
        package var hostInterval = Duration.seconds(5)
        /// How often the queues of all hosts are declared again: the broker deletes those nobody used for long.
        package var queueInterval = Duration.seconds(600)
        /// How long a task may go without being taken on by a host whose worker is alive.
        package var acceptanceTimeout = Duration.seconds(120)
        /// How long control messages are of use; whoever needs one that came too late asks again.
        package var controlValidity = Duration.seconds(600)

        package init(
            names: Names = Names(), policy: TaskMachine.Policy = .init(), tick: Duration = .milliseconds(250),
            startsOnlySubmitted: Bool = false
        ) {
            self.names = names
            self.policy = policy
            self.tick = tick
            self.startsOnlySubmitted = startsOnlySubmitted
        }
    }

    let store: any JobStore
    let watchers = Watchers()
    let clocks = HostClocks()
    let silences = Silences()
    let settings: Settings
    private let submitted = Mutex<Set<String>>([])
    /// Hosts that were heard of once and of which there is no key, as of the last look.
    let forgotten = Mutex<Set<String>>([])
    let bus: any MessageBus
    let member: FleetMember
    let logger: Logger
    let notificationSignal: AsyncStream<Void>
    let notificationContinuation: AsyncStream<Void>.Continuation
    let control = ControlOutbox()
    let outboxSignal: AsyncStream<Void>
    let outboxContinuation: AsyncStream<Void>.Continuation

    /// - Parameter member: named `FleetMember.coordinator`.
    package init(
        store: any JobStore, bus: any MessageBus, member: FleetMember, settings: Settings = .init(), logger: Logger
    ) {
        self.store = store
        self.bus = bus
        self.member = member
        self.settings = settings
        self.logger = logger
        (notificationSignal, notificationContinuation) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(1))
        (outboxSignal, outboxContinuation) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(1))
    }

    /// Runs until the task is cancelled. `hosts` are given their queues, and asked for again as long as it runs; tasks
    /// that were out when the last process ended are taken back first if the bus forgot them with it.
    @concurrent
    package func run(hosts: @escaping @Sendable () throws -> [String]) async throws {
        try await bus.connected()
        try await declare(hosts())
        if !bus.isDurable { try await takeBackOrphans() }
        let events = try await bus.subscribe(settings.names.coordinatorEvents, prefetch: 256)
        defer { events.cancel() }
        let requests =
            settings.requesters.isEmpty ? nil : try await bus.subscribe(settings.names.requests, prefetch: 16)
        defer { requests?.cancel() }
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await self.consume(events) }
            group.addTask { try await self.publishOutbox() }
            group.addTask { await self.publishControl() }
            group.addTask { try await self.watchTime() }
            group.addTask { try await self.welcome(hosts) }
            if let requests {
                group.addTask { try await self.serve(requests) }
                group.addTask { try await self.publishNotifications() }
            }
            try await group.next()
            group.cancelAll()
        }
    }

    /// Applies one decision: a transaction, then what it asks to be told to workers and watchers.
    func decide<Value: Sendable>(
        _ body: @escaping @Sendable (inout Transitions) throws -> Value
    ) async throws -> Value {
        let policy = settings.policy
        let notifies = !settings.requesters.isEmpty
        let active = settings.startsOnlySubmitted ? submitted.withLock { $0 } : nil
        let (value, effects) = try await store.write { [watchers, member] transaction in
            var transitions = Transitions(
                store: transaction, now: .now, policy: policy, active: active, knows: member.knows, notifies: notifies,
                isWatched: watchers.hasWatcher)
            let value = try body(&transitions)
            return (value, transitions.effects)
        }
        submitted.withLock { $0.formUnion(effects.submitted) }
        await carryOut(effects)
        return value
    }

    private func carryOut(_ effects: Transitions.Effects) async {
        if effects.notifies { notificationContinuation.yield() }
        for call in effects.lost { logger.warning("attempt lost", metadata: call.logged()) }
        if effects.sendsTasks {
            Failpoint.coordinatorTaskStored.hit()
            outboxContinuation.yield()
        }
        if !effects.control.isEmpty { await tell(effects.control) }
        for migration in effects.changed { watchers.publish(migration) }
    }

    // MARK: - Loops

    private func takeBackOrphans() async throws {
        try await decide { transitions in
            for task in try transitions.store.tasksWithWorkers() {
                try transitions.store.discardUnsent(task: task.id)
                _ = try transitions.apply(.orphaned, to: task)
            }
        }
    }

    private func watchTime() async throws {
        while !Task.isCancelled {
            let hears = hasHeard(for: settings.policy.leaseDuration)
            let parked = forgotten.withLock { $0 }
            let (due, expired) = try await store.write { [policy = settings.policy] in
                (
                    try $0.dueTasks(now: .now, or: .now + policy.longestWait, except: parked),
                    try $0.expiredTasks(now: .now, grace: policy.leaseDuration)
                )
            }
            if !expired.isEmpty {
                try await decide { transitions in
                    for task in try expired.compactMap(transitions.store.task)
                    where transitions.isActive(task.migrationID) {
                        // Its end may have been said in time.
                        if !hears { guard case .waiting = task.machine.state else { continue } }
                        _ = try transitions.apply(.expire, to: task)
                    }
                }
            }
            // In portions, so that the start of a large wave keeps nobody's events waiting.
            for start in stride(from: 0, to: due.count, by: 256) {
                try await decide { transitions in
                    for id in due[start...].prefix(256) {
                        guard let task = try transitions.store.task(id: id) else { continue }
                        // While nobody can be heard, silence is no sign of death.
                        if case .running = task.machine.state, !hears { continue }
                        let ticked = try transitions.apply(.tick, to: task)
                        _ = try transitions.apply(.dispatch, to: ticked)
                    }
                }
            }
            try await Task.sleep(for: settings.tick)
        }
    }

    /// Whether events have been coming in all through the last `duration`.
    private func hasHeard(for duration: Duration) -> Bool {
        let status = bus.status
        let start = Moment.now - duration
        let consumer = status.consumers.first { $0.queue == settings.names.coordinatorEvents }
        // What began in the future did so before the clock was set back.
        func isLong(_ since: Moment) -> Bool { since <= start || since > .now + duration }
        guard let since = consumer?.activeSince, !bus.isDurable || isLong(since) else { return false }
        return status.connections.allSatisfy { connection in
            guard case .connected(let since) = connection.state else { return false }
            return isLong(since)
        }
    }

    /// Takes together what has come while the last batch was handled: one transaction, one fsync.
    private func consume(_ deliveries: Subscription) async throws {
        let waiting = Waiting()
        let (signal, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                for await delivery in deliveries.deliveries {
                    waiting.deliveries.withLock { $0.append(delivery) }
                    continuation.yield()
                }
                continuation.finish()
            }
            defer { group.cancelAll() }
            for await _ in signal {
                let batch = waiting.deliveries.withLock { deliveries in
                    defer { deliveries = [] }
                    return deliveries
                }
                if !batch.isEmpty { try await handle(batch) }
            }
        }
    }

    private func handle(_ batch: [Delivery]) async throws {
        var good: [(delivery: Delivery, events: WorkerEvents)] = []
        for delivery in batch {
            do { good.append((delivery, try verified(delivery.message))) } catch {
                try await reject(delivery, from: settings.names.coordinatorEvents, "\(error)")
            }
        }
        guard !good.isEmpty else { return }
        do {
            try await handle(good.map(\.events))
            for (delivery, _) in good { await delivery.settle(.ack) }
        } catch  where Task.isCancelled || error.isOfTheStore {
            // This process ends; what is not settled comes again, to the next one.
            throw error
        } catch  where good.count > 1 {
            // Nothing of it was stored: one of them is to blame, and the others must not be.
            for (delivery, _) in good { try await handle([delivery]) }
        } catch {
            try await reject(good[0].delivery, from: settings.names.coordinatorEvents, "\(error)")
        }
    }

    /// What a worker says under its own name. Throws the reason for which it can't be believed.
    func verified(_ message: Messaging.Message) throws -> WorkerEvents {
        let now = Moment.now
        let issuer: String
        do { issuer = try member.verify(message, now: now) } catch {
            // What is refused for its host's clock tells of that clock.
            if let signed = try? member.signature(of: message) {
                clocks.note(signed.issuer, signedAt: signed.issued, now: now)
            }
            throw error
        }
        if let issued = message.issuedAt { clocks.note(issuer, signedAt: issued, now: now) }
        guard message.type == EventPublisher.messageType else {
            throw MigrationError(.invalidArgument, "'\(message.type)' is no type of event")
        }
        let events: WorkerEvents
        do { events = try WorkerEvents(serializedBytes: message.body) } catch {
            throw MigrationError(.invalidArgument, "its body is no WorkerEvents message")
        }
        guard events.host == issuer, message.userID.isEmpty || message.userID == issuer else {
            throw MigrationError(
                .permissionDenied,
                "\(issuer) signed it, for host '\(events.host)', as broker user '\(message.userID)'")
        }
        return events
    }

    func reject(_ delivery: Delivery, from queue: String, _ reason: String) async throws {
        let message = delivery.message
        logger.warning(
            "message rejected", metadata: ["queue": "\(queue)", "user": "\(message.userID)", "reason": "\(reason)"])
        let rejected = MessageRejected.with {
            $0.queue = queue
            $0.messageID = message.messageID
            $0.type = message.type
            $0.taskID = message.correlationID
            $0.reason = reason
        }
        try await store.write { try $0.note(rejected, by: FleetMember.coordinator, at: .now) }
        await delivery.settle(.reject(reason: reason))
    }

    /// What workers said, in one transaction. Safe to call twice with the same events.
    func handle(_ batch: [WorkerEvents]) async throws {
        // Signs of life are worth something for as long as a lease lasts: old ones must not keep a dead worker alive.
        // A host's clock may be as wrong as its signatures may.
        let horizon = Moment.now - settings.policy.leaseDuration - FleetMember.clockTolerance
        let patience = settings.acceptanceTimeout
        for events in batch {
            for event in events.events {
                guard case .task(let task) = event.event else { continue }
                try await hear(task, from: events.host, isOld: event.time.moment < horizon)
            }
        }
        try await decide { transitions in
            for events in batch {
                for event in events.events {
                    try transitions.take(
                        event, from: events.host, isOld: event.time.moment < horizon, patience: patience)
                }
            }
        }
        let events = batch.flatMap(\.events)
        let hosts = Set(events.compactMap { if case .inventory(let profile) = $0.event { profile.name } else { nil } })
        for host in hosts where batch.contains(where: { $0.host == host }) { watchers.publish(host: host) }
        if events.contains(where: { if case .task(let task) = $0.event { !task.isUpdate } else { false } }) {
            Failpoint.coordinatorResultStored.hit()
        }
    }
}

private final class Waiting: Sendable {
    let deliveries = Mutex<[Delivery]>([])
}

extension Transitions {
    /// - Parameter patience: how long a task may go without being taken on by a worker that lives.
    fileprivate mutating func take(
        _ event: WorkerEvent, from host: String, isOld: Bool, patience: Duration
    ) throws {
        switch event.event {
        case .task(let task) where task.isUpdate || isOld && task.isHeartbeat: break
        case .task(let task): try handle(task, from: host)
        case .inventory(let profile) where profile.name == host:
            let known = try store.host(host)?.profile.capturedAt.moment ?? profile.capturedAt.moment
            // One of the future is of a clock that was put right since.
            let isCredible = known <= now + FleetMember.clockTolerance
            if known <= profile.capturedAt.moment || !isCredible { try store.save(profile, at: now) }
        case .heartbeat where !isOld: try noteAlive(host, patience)
        case .rejected(let rejected): try store.note(rejected, by: host, at: now)
        case .heartbeat, .inventory, nil: break
        }
    }

    /// A worker that lives takes a task on within seconds of its arrival. One that was sent long ago and is still not
    /// taken on is lost: dead-lettered, or in a queue that is gone.
    private mutating func noteAlive(_ host: String, _ patience: Duration) throws {
        try store.touch(host: host, at: now)
        for task in try store.tasksSent(to: host, before: now - patience, or: now + patience) {
            let lost = try apply(.unclaimed, to: task)
            _ = try apply(.dispatch, to: lost)
        }
        for task in try store.unsweptTasks(of: host) { _ = try apply(.alive, to: task) }
    }
}

extension TaskEvent {
    fileprivate var isUpdate: Bool { if case .update = kind { true } else { false } }
    fileprivate var isHeartbeat: Bool { if case .heartbeat = kind { true } else { false } }
}

extension Error {
    /// The database can't be used: no fault of a message, which another process may handle when that is mended.
    var isOfTheStore: Bool {
        let codes: [MigrationError.Code] = [.internal, .dataLoss, .resourceExhausted, .unavailable]
        return (self as? MigrationError).map { codes.contains($0.code) } ?? false
    }
}
