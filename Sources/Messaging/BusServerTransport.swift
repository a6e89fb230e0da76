package import FlotillaProtocol
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
/// Concurrency: any number of tasks is accepted, `slots` of them run at once, the rest wait their turn with their
/// lease alive. A lease that runs out stops the handler before the coordinator may give the task away.
package final class BusServerTransport: ServerTransport {
    package typealias Bytes = [UInt8]

    package struct Settings: Sendable {
        /// Handlers that run at once.
        package var slots: Int
        package var heartbeat: Duration
        /// Until the coordinator's first answer says otherwise.
        package var leaseDuration: Duration

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
    private let names: Names
    private let slots: Slots

    private struct State {
        var methods: [String: MethodDescriptor] = [:]
        var calls: [String: RunningCall] = [:]
        var subscription: Subscription?
        var isShuttingDown = false
        var isStopping = false
    }

    private let state = Mutex(State())

    package init(
        bus: any MessageBus, names: Names, member: FleetMember, settings: Settings = Settings(),
        ledger: any TaskLedger, logger: Logger
    ) {
        self.bus = bus
        self.names = names
        self.settings = settings
        self.member = member
        self.ledger = ledger
        self.logger = logger
        events = EventPublisher(bus: bus, names: names, member: member)
        slots = Slots(settings.slots)
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

    // MARK: - One task

    private func receive(_ delivery: Delivery, _ handler: @escaping StreamHandler) async {
        let call: TaskCall
        do {
            let isLate = try requireCoordinator(delivery.message)
            call = try TaskCall(decoding: delivery.message, audience: member.name)
            if let isLate {
                // The task itself is as good as ever: another attempt, signed anew, will do.
                _ = await refuse(call.identity, MigrationError(.unavailable, "the task came too late: \(isLate)"))
                throw isLate
            }
        } catch {
            return await reject(delivery, from: names.tasks(of: member.name), "\(error)")
        }
        guard let method = state.withLock({ $0.methods[call.method] }) else {
            let error = MigrationError(.unimplemented, "method /\(call.method) is not served here")
            _ = await refuse(call.identity, error)
            return await reject(delivery, from: names.tasks(of: member.name), "\(error)")
        }
        do {
            try await take(call, method, delivery, handler)
        } catch {
            // The ledger can't take it: the task did not begin, and the coordinator must hear why.
            logger.error("task not taken on", metadata: ["task": "\(call.identity)", "error": "\(error)"])
            let isTold = await refuse(call.identity, error as? MigrationError ?? MigrationError(.internal, "\(error)"))
            await delivery.settle(isTold ? .ack : .requeue)
        }
    }

    /// Throws unless the coordinator said this, to us. Returns the error of a message that is good but too old.
    private func requireCoordinator(_ message: Message) throws -> MigrationError? {
        guard message.body.count <= Message.maximumBody else {
            throw MigrationError(
                .invalidArgument, "its body has \(message.body.count) bytes, \(Message.maximumBody) are allowed")
        }
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
    private func reject(_ delivery: Delivery, from queue: String, _ reason: String) async {
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
        while let other = enter(running) {
            guard other.identity.fence < call.identity.fence else { return await settleCopy(delivery, of: call) }
            other.stop(.lostOwnership("attempt \(call.identity.attempt) was issued"))
            await other.waitForEnd()
        }
        defer {
            state.withLock { if $0.calls[call.identity.task] === running { $0.calls[call.identity.task] = nil } }
            running.markEnded()
        }
        let admission = try await ledger.admit(call)
        if admission == .stale { return await settleCopy(delivery, of: call) }
        logger.info(
            "task taken on",
            metadata: [
                "task": "\(call.identity.task)", "attempt": "\(call.identity.attempt)",
                "fence": "\(call.identity.fence)", "method": "\(call.method)",
                "traceparent": "\(call.traceparent ?? "-")",
            ])
        Failpoint.workerAccepted.hit()
        let accepted = running.nextSequence(asksForLease: true)
        try await events.publish(
            TaskEvent(call.identity, sequence: accepted, .accepted(TaskAccepted())))
        await delivery.settle(.ack)
        Failpoint.workerAcceptedPublished.hit()

        switch admission {
        case .stale: return
        case .ended(let ended): await end(running, ended)
        case .run:
            let ticket = slots.ticket()
            running.onStop { [slots] in slots.abandon(ticket) }
            let isIn = await slots.enter(ticket)
            let ended = await execute(call, method, running, handler)
            if isIn { slots.leave(ticket) }
            if let ended { await end(running, ended) }
        }
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
            logger.error("refusal not published", metadata: ["task": "\(call)", "error": "\(error)"])
            return false
        }
    }

    /// Makes `call` its task's only one here, or returns the one that is. After a shutdown began it enters stopped.
    private func enter(_ call: RunningCall) -> RunningCall? {
        let (other, isStopping) = state.withLock { state in
            if let other = state.calls[call.identity.task] { return (RunningCall?.some(other), state.isStopping) }
            state.calls[call.identity.task] = call
            return (nil, state.isStopping)
        }
        if isStopping { call.stop(.shutdown) }
        return other
    }

    /// Journals and publishes the end. A publish that fails is made up for by the heartbeat.
    private func end(_ call: RunningCall, _ ended: TaskEnded) async {
        let event = TaskEvent(call.identity, sequence: call.nextSequence(), .ended(ended.thatFits))
        logger.info(
            "task ended",
            metadata: [
                "task": "\(call.identity.task)", "attempt": "\(call.identity.attempt)",
                "fence": "\(call.identity.fence)", "code": "\(ended.code)", "message": "\(ended.message)",
            ])
        do {
            try await ledger.recordEnd(of: call.identity, event)
        } catch {
            // What is not durable must not count as done; but nobody should wait for the lease to run out either.
            logger.error("result not journaled", metadata: ["task": "\(call.identity)", "error": "\(error)"])
            _ = await refuse(call.identity, error as? MigrationError ?? MigrationError(.internal, "\(error)"))
            return
        }
        do {
            Failpoint.workerResultJournaled.hit()
            try await events.publish(event)
            Failpoint.workerResultPublished.hit()
        } catch {
            logger.error("result not published yet", metadata: ["task": "\(call.identity)", "error": "\(error)"])
        }
    }

    // MARK: - Control and heartbeat

    private func obey(_ delivery: Delivery) async {
        let messages: [ControlMessage]
        do {
            if let isLate = try requireCoordinator(delivery.message) { throw isLate }
            guard delivery.message.type == "flotilla.v1.ControlMessages" else {
                throw MigrationError(.invalidArgument, "'\(delivery.message.type)' is no type of control message")
            }
            messages = try ControlMessages(serializedBytes: delivery.message.body).messages
        } catch {
            return await reject(delivery, from: names.control(of: member.name), "\(error)")
        }
        await delivery.settle(.ack)
        await withDiscardingTaskGroup { group in
            for message in messages {
                if case .stored = message.kind {
                    // At once, so that the ledger can write them together.
                    group.addTask { await self.forget(message.taskID, message.fence) }
                } else {
                    obey(message)
                }
            }
        }
    }

    private func forget(_ task: String, _ fence: UInt64) async {
        do { try await ledger.acknowledge(task: task, fence: fence) } catch {
            logger.error("ledger", metadata: ["task": "\(task)", "error": "\(error)"])
        }
    }

    private func obey(_ control: ControlMessage) {
        guard let call = state.withLock({ $0.calls[control.taskID] }), call.identity.fence == control.fence else {
            return
        }
        switch control.kind {
        case .lease(let lease): call.renew(answering: lease.answersSeq, ttl: .milliseconds(lease.ttlMs))
        case .permit(let reply): call.answer(reply)
        case .cancel(let cancel) where cancel.revoked: call.stop(.lostOwnership(cancel.reason))
        case .cancel(let cancel): call.stop(.cancelled(cancel.reason))
        case .stored, nil: break
        }
    }

    private func ask(_ step: String, _ call: RunningCall) async {
        let event = TaskEvent(
            call.identity, sequence: call.nextSequence(), .permit(.with { $0.step = step }))
        do { try await events.publish(event) } catch {
            logger.warning("permit not asked for yet", metadata: ["task": "\(call.identity)", "error": "\(error)"])
        }
    }

    /// Until cancelled: renews leases, repeats unanswered questions and results.
    private func heartbeat() async {
        while (try? await Task.sleep(for: settings.heartbeat)) != nil {
            for call in state.withLock({ Array($0.calls.values) }) {
                let event = TaskEvent(
                    call.identity, sequence: call.nextSequence(asksForLease: true), .heartbeat(TaskHeartbeat()))
                try? await events.publish(event)
                for step in call.pendingPermits { await ask(step, call) }
            }
            let held = state.withLock { $0.calls.count }
            try? await events.publish(.heartbeat(.with { $0.tasks = UInt32(held) }))
            await republish()
        }
    }

    /// Until cancelled: stops calls whose lease is about to run out. Waits for nothing but time, so that a broker that is
    /// away keeps no call alive.
    private func watchLeases() async {
        while (try? await Task.sleep(for: settings.heartbeat / 4)) != nil {
            for call in state.withLock({ Array($0.calls.values) }) where call.mustStop {
                call.stop(.lostOwnership("its lease was not renewed"))
            }
        }
    }

    package func publishInventory(_ profile: HostProfile) async throws { try await events.publish(.inventory(profile)) }

    /// Says of what an earlier process held that nobody works on it any more. Called before anything is served. What
    /// can't be said goes on when its lease has run out.
    package func release(_ calls: [CallIdentity]) async {
        for call in calls {
            logger.info(
                "task released",
                metadata: ["task": "\(call.task)", "attempt": "\(call.attempt)", "fence": "\(call.fence)"])
            try? await events.publish(TaskEvent(call, sequence: Self.releaseSequence, .released(TaskReleased())))
        }
    }

    /// Far above what one process counts to: how far the one that is gone had come is not known.
    private static let releaseSequence: UInt64 = 1 << 40

    /// Says again what ended and was never confirmed. Called at start as well.
    package func republish() async {
        for event in await ledger.unacknowledged() { try? await events.publish(event) }
    }
}
