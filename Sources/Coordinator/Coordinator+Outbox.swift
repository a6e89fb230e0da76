import FlotillaProtocol
import HostKit
import Logging
import Messaging
import MigrationModel

/// From the outbox to the hosts' queues.
extension Coordinator {
    func publishOutbox() async throws {
        outboxContinuation.yield()
        for await _ in outboxSignal {
            while true {
                let rows = try await store.write { try $0.unsent(limit: 256) }
                if rows.isEmpty { break }
                let outcomes = await withTaskGroup { group in
                    for row in rows { group.addTask { (row, await self.send(row)) } }
                    return await group.reduce(into: []) { $0.append($1) }
                }
                let sent = outcomes.filter { $0.1 == nil }.map { $0.0.id }
                if !sent.isEmpty {
                    try await store.write { store in for id in sent { try store.markSent(id, at: .now) } }
                    Failpoint.coordinatorTaskSent.hit()
                }
                for case (let row, let error?) in outcomes { try await takeBack(row, error) }
                // The bus has tried for long already; what it could not send stays in the outbox.
                if sent.isEmpty { try await Task.sleep(for: settings.tick) }
            }
        }
    }

    /// Returns the reason for which it could not be sent.
    private func send(_ row: OutboxRecord) async -> MigrationError? {
        var call = TaskCall(
            identity: row.identity, method: row.method, audience: row.host, deadline: row.deadline, body: row.body)
        call.traceparent = row.identity.traceparent
        do {
            guard row.body.count <= Message.maximumBody else {
                throw MigrationError(
                    .invalidArgument,
                    "\(row.identity): its request has \(row.body.count) bytes, a message holds \(Message.maximumBody)")
            }
            try await bus.publish(
                call.message(settings.names, messageID: row.id, from: member, validity: settings.taskValidity))
            logger.info("task sent", metadata: metadata(row))
            return nil
        } catch {
            logger.error("task not sent", metadata: metadata(row).merging(["error": "\(error)"]) { $1 })
            return error as? MigrationError ?? MigrationError(.unavailable, "\(error)")
        }
    }

    private func metadata(_ row: OutboxRecord) -> Logger.Metadata {
        row.identity.logged(["host": "\(row.host)", "method": "\(row.method)"])
    }

    /// Where no repetition helps (too large, or nobody's), the task fails with the reason instead of blocking the rest.
    private func takeBack(_ row: OutboxRecord, _ error: MigrationError) async throws {
        // A host that has just joined gets its queues in a moment; in one process nothing of that kind is on its way.
        let isFinal: [MigrationError.Code] = [.invalidArgument, .permissionDenied] + (bus.isDurable ? [] : [.notFound])
        guard isFinal.contains(error.code) else { return }
        try await decide { transitions in
            try transitions.store.markSent(row.id, at: transitions.now)
            guard let task = try transitions.store.task(id: row.identity.task) else { return }
            _ = try transitions.apply(
                .ended(fence: row.identity.fence, outcome: .failure(code: error.code.rawValue)), to: task,
                ended: TaskEnded(error))
        }
    }
}
