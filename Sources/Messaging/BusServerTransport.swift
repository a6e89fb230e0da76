import FlotillaProtocol
package import GRPCCore
import HostKit
package import Logging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// Serves gRPC services from a host's task queue. For each delivered task:
///
///  1. verify signature, audience and validity, decode it; what can't be right goes to the dead letters with the reason
///  2. enter it in the ledger, publish `Accepted`, settle the delivery: from here on the lease owns the task
///  3. run the handler; its messages become update events, a heartbeat renews the lease
///  4. enter the end in the ledger, publish it, and again until the coordinator confirms that it has it
///
/// Concurrency: any number of tasks is accepted, `slots` of them run at once, and as many of the services that are
/// `prompt`; the rest wait their turn with their lease alive. A lease that runs out stops the handler before the
/// coordinator may give the task away.
package final class BusServerTransport: ServerTransport {
    package typealias Bytes = [UInt8]

    package struct Settings: Sendable {
        /// Handlers that run at once.
        package var slots: Int
        /// Services whose tasks have as many slots of their own: they never wait for the others, which may take hours.
        package var prompt: Set<ServiceDescriptor> = []
        package var heartbeat: Duration
        /// Until the coordinator's first answer says otherwise.
        package var leaseDuration: Duration
        /// How long a handler may report nothing before that is said.
        package var silenceLimit = Duration.seconds(15 * 60)
        /// Throws for a body that is no request of its method.
        package var requireRequest: @Sendable (_ method: String, _ body: [UInt8]) throws -> Void = { _, _ in }

        package init(
            slots: Int = 4, heartbeat: Duration = .seconds(10), leaseDuration: Duration = .seconds(60)
        ) {
            self.slots = slots
            self.heartbeat = heartbeat
            self.leaseDuration = leaseDuration
        }
    }

    typealias StreamHandler = @concurrent @Sendable (RPCStream<Inbound, Outbound>, ServerContext) async -> Void

    let settings: Settings
    let member: FleetMember
    let ledger: any TaskLedger
    let events: EventPublisher
    let logger: Logger
    private let bus: any MessageBus
    let names: Names
    private let slots: Slots
    private let promptSlots: Slots

    struct State {
        var methods: [String: MethodDescriptor] = [:]
        var calls: [String: RunningCall] = [:]
        /// Tasks that are being cleaned up after, and who waits for the end of that.
        var sweeps: [String: [CheckedContinuation<Void, Never>]] = [:]
        var subscription: Subscription?
        var isShuttingDown = false
        var isStopping = false
        var repetitions: Repetitions
    }

    let state: Mutex<State>

    package init(
        bus: any MessageBus, names: Names, member: FleetMember, settings: Settings = Settings(),
        ledger: any TaskLedger, logger: Logger
    ) {
        self.bus = bus
        self.names = names
        self.settings = settings
        state = Mutex(State(repetitions: Repetitions(first: settings.heartbeat)))
        self.member = member
        self.ledger = ledger
        self.logger = logger
        events = EventPublisher(bus: bus, names: names, member: member)
        slots = Slots(settings.slots)
        promptSlots = Slots(settings.slots)
    }

    package func configure(context: GRPCServerContext) {
        state.withLock { state in
            for method in context.methods { state.methods[method.fullyQualifiedMethod] = method }
        }
    }

    package func listen(
        streamHandler: @escaping @concurrent @Sendable (RPCStream<Inbound, Outbound>, ServerContext) async -> Void
    ) async throws {
        let control = try await bus.subscribe(names.control(of: member.name), prefetch: 256)
        let tasks = try await bus.subscribe(names.tasks(of: member.name), prefetch: 64)
        let stopped = state.withLock {
            $0.subscription = tasks
            return $0.isShuttingDown
        }
        if stopped { tasks.cancel() }

        await withTaskGroup(of: Void.self) { group in
            group.addTask { for await delivery in control.deliveries { await self.obey(delivery) } }
            group.addTask { await self.heartbeat() }
            group.addTask { await self.repeatResults() }
            group.addTask { await self.watchLeases() }
            await withDiscardingTaskGroup { calls in
                for await delivery in tasks.deliveries {
                    calls.addTask { await self.receive(delivery, streamHandler) }
                }
            }
            control.cancel()
            group.cancelAll()
        }
    }

    /// Takes no more tasks; those that run go on to their end, and `listen` returns after them.
    package func beginGracefulShutdown() {
        let subscription = state.withLock {
            $0.isShuttingDown = true
            return $0.subscription
        }
        subscription?.cancel()
    }

    /// Takes no more tasks and stops those that run, at their last checkpoint. Nothing is said about them: the next
    /// process goes on with them.
    package func stopNow() {
        beginGracefulShutdown()
        let calls = state.withLock {
            $0.isStopping = true
            return Array($0.calls.values)
        }
        for call in calls { call.stop(.shutdown) }
    }

    /// Asks the coordinator for the one-shot right to an irreversible step. Throws when it is refused, or when the
    /// call has been stopped.
    package func permit(_ step: String, for identity: CallIdentity) async throws {
        guard let call = state.withLock({ $0.calls[identity.task] }), call.identity == identity else {
            throw MigrationError(.aborted, "\(identity) does not run here any more")
        }
        try await call.permit(step) { await self.ask(step, call) }
    }

    /// Whether the call may still act on the host, if only to take back what it did: it was not taken from this worker,
    /// and the process goes on.
    package func mayAct(_ identity: CallIdentity) -> Bool {
        guard let call = state.withLock({ $0.calls[identity.task] }), call.identity == identity else { return false }
        return switch call.stopReason {
        case nil, .cancelled, .deadline: true
        case .lostOwnership, .shutdown: false
        }
    }

    /// A task that was to stop and goes on for longer than any stop takes: something it called does not return. Nil when
    /// there is none.
    package func pretence(longestStop: Duration) -> String? {
        for call in state.withLock({ Array($0.calls.values) }) {
            guard let overtime = call.overtime, overtime > longestStop else { continue }
            return
                "\(call.identity) was to stop \(overtime.components.seconds) s ago (\(call.stopReason.map { "\($0)" } ?? "-"))"
        }
        return nil
    }

    // MARK: - One task

    private func receive(_ delivery: Delivery, _ handler: @escaping StreamHandler) async {
        let call: TaskCall
        do {
            let isLate = try requireCoordinator(delivery.message)
            call = try TaskCall(decoding: delivery.message, audience: member.name)
            if let isLate {
                // An old copy of what runs here must not end it, nor take the place of its result.
                let running = state.withLock { $0.calls[call.identity.task]?.identity.fence }
                let ended = await ledger.unacknowledged().first { $0.taskID == call.identity.task }?.fence
                if max(running ?? 0, ended ?? 0) >= call.identity.fence { return await settleCopy(delivery, of: call) }
                // The task itself is as good as ever: another attempt, signed anew, will do.
                _ = await refuse(call.identity, MigrationError(.unavailable, "the task came too late: \(isLate)"))
                throw isLate
            }
        } catch {
            return await reject(delivery, from: names.tasks(of: member.name), "\(error)")
        }
        let method: MethodDescriptor
        do {
            guard let served = state.withLock({ $0.methods[call.method] }) else {
                throw MigrationError(.unimplemented, "method /\(call.method) is not served here")
            }
            try settings.requireRequest(call.method, call.body)
            method = served
        } catch {
            // Its sender is known, and waits for an end.
            _ = await refuse(call.identity, error as? MigrationError ?? MigrationError(.internal, "\(error)"))
            return await reject(delivery, from: names.tasks(of: member.name), "\(error)")
        }
        do {
            try await take(call, method, delivery, handler)
        } catch {
            // The ledger can't take it: the task did not begin, and the coordinator must hear why.
            logger.error("task not taken on", metadata: call.identity.logged(["error": "\(error)"]))
            let isTold = await refuse(call.identity, error as? MigrationError ?? MigrationError(.internal, "\(error)"))
            await delivery.settle(isTold ? .ack : .requeue)
        }
    }

    /// Throws unless the coordinator said this, to us. Returns the error of a message that is good but too old.
    func requireCoordinator(_ message: Message) throws -> MigrationError? {
        do {
            let issuer = try member.verify(message)
            guard issuer == FleetMember.coordinator else {
                throw MigrationError(.permissionDenied, "it comes from \(issuer), not from the coordinator")
            }
            return nil
        } catch let error as MigrationError where error.code == .deadlineExceeded {
            return error
        }
    }

    /// To the dead letters. The reason goes to the coordinator first: no broker carries one with a rejection.
    func reject(_ delivery: Delivery, from queue: String, _ reason: String) async {
        logger.warning(
            "message rejected",
            metadata: ["queue": "\(queue)", "task": "\(delivery.message.correlationID)", "reason": "\(reason)"])
        let rejected = MessageRejected.with {
            $0.queue = queue
            $0.messageID = delivery.message.messageID
            $0.type = delivery.message.type
            $0.taskID = delivery.message.correlationID
            $0.reason = reason
        }
        do {
            try await events.publish(.rejected(rejected))
            await delivery.settle(.reject(reason: reason))
        } catch {
            await delivery.settle(.requeue)
        }
    }

    /// What was taken on before: the broker's own repetition is forgotten, anybody else's is a replay.
    private func settleCopy(_ delivery: Delivery, of call: TaskCall) async {
        guard delivery.redeliveries == 0 else { return await delivery.settle(.ack) }
        await reject(
            delivery, from: names.tasks(of: member.name),
            "replay: \(call.identity), or a later attempt, was taken on before")
    }

    private func take(
        _ call: TaskCall, _ method: MethodDescriptor, _ delivery: Delivery, _ handler: @escaping StreamHandler
    ) async throws {
        let running = RunningCall(call.identity, lease: settings.leaseDuration)
        // An older attempt on this host must be out of the way before the new one touches its files.
        while let obstacle = enter(running) {
            switch obstacle {
            case .sweep: await sweepEnded(of: call.identity.task)
            case .call(let other):
                guard other.identity.fence < call.identity.fence else { return await settleCopy(delivery, of: call) }
                other.stop(.lostOwnership("attempt \(call.identity.attempt) was issued"))
                await other.waitForEnd()
            }
        }
        defer {
            state.withLock { if $0.calls[call.identity.task] === running { $0.calls[call.identity.task] = nil } }
            running.markEnded()
        }
        let admission = try await ledger.admit(call)
        if admission == .stale { return await settleCopy(delivery, of: call) }
        logger.info(
            "task taken on",
            metadata: call.identity.logged([
                "method": "\(call.method)", "traceparent": "\(call.traceparent ?? "-")",
            ]))
        Failpoint.workerAccepted.hit()
        guard await sayAccepted(running) else { return await delivery.settle(.requeue) }
        await delivery.settle(.ack)
        Failpoint.workerAcceptedPublished.hit()

        switch admission {
        case .stale: return
        case .ended(let ended): await end(running, ended)
        case .run:
            // It passes while the task waits for its turn, too.
            let timer = deadlineTimer(call.deadline, running)
            defer { timer?.cancel() }
            let slots = settings.prompt.contains(method.service) ? promptSlots : self.slots
            let ticket = slots.ticket()
            running.onStop { [slots] in slots.abandon(ticket) }
            let isIn = await slots.enter(ticket)
            let ended = await execute(call, method, running, handler)
            if isIn { slots.leave(ticket) }
            if let ended { return await end(running, ended) }
            let reason = running.stopReason.map { "\($0)" } ?? "-"
            logger.warning("task stopped", metadata: call.identity.logged(["reason": "\(reason)"]))
            guard case .shutdown = running.stopReason else { return }
            do { try await ledger.recordStop(of: call.identity) } catch {
                logger.warning("its stop is not noted", metadata: call.identity.logged(["error": "\(error)"]))
            }
        }
    }

    /// Returns once the bus has it; false when the lease has run out before. A broker that refuses for now, its queue
    /// without a leader or full, is no reason to fail a task.
    private func sayAccepted(_ call: RunningCall) async -> Bool {
        while call.stopReason == nil, !Task.isCancelled {
            let accepted = call.nextSequence(asksForLease: true)
            do {
                try await events.publish(TaskEvent(call.identity, sequence: accepted, .accepted(TaskAccepted())))
                return true
            } catch {
                logger.warning("not said to be taken on yet", metadata: call.identity.logged(["error": "\(error)"]))
                try? await Task.sleep(for: settings.heartbeat / 4)
            }
        }
        return false
    }

    /// Tells the coordinator of a task that was never taken on. False when that was not possible.
    private func refuse(_ call: CallIdentity, _ error: MigrationError) async -> Bool {
        let ended = TaskEnded.with {
            $0.code = Int32(error.code.rawValue)
            $0.message = error.message
            $0.hint = error.hint ?? ""
        }
        do {
            try await events.publish(TaskEvent(call, sequence: 1, .ended(ended)))
            return true
        } catch {
            logger.error("refusal not published", metadata: call.logged(["error": "\(error)"]))
            return false
        }
    }

    private enum Obstacle {
        case call(RunningCall)
        case sweep
    }

    /// Makes `call` its task's only one here, or returns what is in the way. After a shutdown began it enters stopped.
    private func enter(_ call: RunningCall) -> Obstacle? {
        let (obstacle, isStopping) = state.withLock { state -> (Obstacle?, Bool) in
            let task = call.identity.task
            if let other = state.calls[task] { return (.call(other), state.isStopping) }
            if state.sweeps[task] != nil { return (.sweep, state.isStopping) }
            state.calls[task] = call
            return (nil, state.isStopping)
        }
        if isStopping { call.stop(.shutdown) }
        return obstacle
    }

    /// Journals and publishes the end. A publish that fails is made up for by the heartbeat.
    private func end(_ call: RunningCall, _ ended: TaskEnded) async {
        let event = TaskEvent(call.identity, sequence: call.nextSequence(), .ended(ended.thatFits))
        var said: Logger.Metadata = ["code": "\(ended.code)"]
        if !ended.message.isEmpty { said["message"] = "\(ended.message)" }
        logger.info("task ended", metadata: call.identity.logged(said))
        do {
            try await ledger.recordEnd(of: call.identity, event)
        } catch {
            // What is not durable must not count as done; but nobody should wait for the lease to run out either. The next
            // attempt finds what this one did.
            logger.error("result not journaled", metadata: call.identity.logged(["error": "\(error)"]))
            _ = await refuse(
                call.identity,
                MigrationError(
                    .unavailable, "the worker could not keep how the task ended: \(error)",
                    hint: (error as? MigrationError)?.hint ?? "look after the worker's state folder"))
            return
        }
        do {
            Failpoint.workerResultJournaled.hit()
            try await events.publish(event)
            Failpoint.workerResultPublished.hit()
        } catch {
            logger.error("result not published yet", metadata: call.identity.logged(["error": "\(error)"]))
        }
    }
}
