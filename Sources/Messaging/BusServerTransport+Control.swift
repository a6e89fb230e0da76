package import FlotillaProtocol
import Logging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// What the coordinator says besides tasks, and what is said to it without being asked.
extension BusServerTransport {
    func obey(_ delivery: Delivery) async {
        let messages: [ControlMessage]
        do {
            if let isLate = try requireCoordinator(delivery.message) { throw isLate }
            guard delivery.message.type == "flotilla.v1.ControlMessages" else {
                throw MigrationError(.invalidArgument, "'\(delivery.message.type)' is no type of control message")
            }
            guard let content = try? ControlMessages(serializedBytes: delivery.message.body) else {
                throw MigrationError(.invalidArgument, "its body is no ControlMessages message")
            }
            // Task ids become file names.
            guard content.messages.allSatisfy({ TaskCall.isIdentifier($0.taskID) }) else {
                throw MigrationError(.invalidArgument, "a control message of it names no task")
            }
            messages = content.messages
        } catch {
            return await reject(delivery, from: names.control(of: member.name), "\(error)")
        }
        await delivery.settle(.ack)
        for message in messages {
            switch message.kind {
            case .stored: _ = sweep(message)
            case .cancel(let cancel) where !cancel.revoked && sweep(message): break
            default: obey(message)
            }
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

    func ask(_ step: String, _ call: RunningCall) async {
        let event = TaskEvent(
            call.identity, sequence: call.nextSequence(), .permit(.with { $0.step = step }))
        do { try await events.publish(event) } catch {
            logger.warning("permit not asked for yet", metadata: call.identity.logged(["error": "\(error)"]))
        }
    }

    /// Until cancelled: renews leases, repeats unanswered questions. What is said together travels together.
    func heartbeat() async {
        while (try? await Task.sleep(for: settings.heartbeat)) != nil {
            let (calls, takesMore) = state.withLock { (Array($0.calls.values), !$0.isShuttingDown) }
            await withDiscardingTaskGroup { group in
                for call in calls {
                    let beat = TaskHeartbeat.with { $0.secondsWithoutProgress = secondsWithoutProgress(call) }
                    let event = TaskEvent(
                        call.identity, sequence: call.nextSequence(asksForLease: true), .heartbeat(beat))
                    group.addTask { try? await self.events.publish(event) }
                    for step in call.pendingPermits { group.addTask { await self.ask(step, call) } }
                }
                // It means that tasks are taken on as they come.
                guard takesMore else { return }
                group.addTask { try? await self.events.publish(.heartbeat(.with { $0.tasks = UInt32(calls.count) })) }
            }
        }
    }

    /// 0 while that is no longer than usual. What hangs without having been stopped is for a person to judge.
    private func secondsWithoutProgress(_ call: RunningCall) -> UInt32 {
        guard let (silence, isNews) = call.silence(of: settings.silenceLimit) else { return 0 }
        let seconds = silence.components.seconds
        if isNews {
            logger.warning("task without progress", metadata: call.identity.logged(["minutes": "\(seconds / 60)"]))
        }
        return UInt32(clamping: seconds)
    }

    /// Until cancelled: says results again that were not confirmed.
    func repeatResults() async {
        while (try? await Task.sleep(for: settings.heartbeat)) != nil { await republish() }
    }

    /// Until cancelled: stops calls whose lease is about to run out. Waits for nothing but time, so that a broker that is
    /// away keeps no call alive.
    func watchLeases() async {
        while (try? await Task.sleep(for: settings.heartbeat / 4)) != nil {
            for call in state.withLock({ Array($0.calls.values) }) where call.mustStop {
                call.stop(.lostOwnership("its lease was not renewed"))
            }
        }
    }

    package func publishInventory(_ profile: HostProfile) async throws { try await events.publish(.inventory(profile)) }

    /// Says of what an earlier process held that nobody works on it any more. Called before anything is served. What
    /// can't be said goes on when its lease has run out.
    ///
    /// - Parameter isBlameless: whether it can't be what ended that process.
    package func release(_ calls: [CallIdentity], isBlameless: (CallIdentity) -> Bool) async {
        for call in calls {
            let released = TaskReleased.with { $0.blameless = isBlameless(call) }
            logger.info("task released", metadata: call.logged())
            try? await events.publish(TaskEvent(call, sequence: Self.releaseSequence, .released(released)))
        }
    }

    /// Far above what one process counts to: how far the one that is gone had come is not known.
    private static let releaseSequence: UInt64 = 1 << 40
    static let discardSequence = releaseSequence + 1

    /// Says what ended and was never confirmed, where its turn has come. Called at start as well.
    package func republish() async {
        let unconfirmed = await ledger.unacknowledged()
        let due = state.withLock { $0.repetitions.due(unconfirmed, now: .now) }
        await withDiscardingTaskGroup { group in
            for event in due {
                group.addTask {
                    do { try await self.events.publish(event) } catch {
                        self.state.withLock { $0.repetitions.failed(event, now: .now) }
                    }
                }
            }
        }
    }
}
