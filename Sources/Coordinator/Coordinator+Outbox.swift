import FlotillaProtocol
import HostKit
import Logging
import Messaging
import MigrationModel
import Synchronization

/// From the outbox to the hosts' queues. A host whose queue takes nothing for now keeps no other waiting.
extension Coordinator {
    func publishOutbox() async throws {
        let limit = 256
        let sending = Sending()
        outboxContinuation.yield()
        try await withThrowingDiscardingTaskGroup { group in
            for await _ in outboxSignal {
                let (outcomes, hosts) = sending.next()
                let sent = outcomes.filter { $0.error == nil }.map(\.row.id)
                for case (let row, let error?) in outcomes { try await takeBack(row, error) }
                let rows = try await store.write { store in
                    for id in sent { try store.markSent(id, at: .now) }
                    return try store.unsent(limit: limit, except: hosts)
                }
                if !sent.isEmpty { Failpoint.coordinatorTaskSent.hit() }
                for (host, rows) in Dictionary(grouping: rows, by: \.host) {
                    guard member.knows(host) else {
                        try await park(rows)
                        continue
                    }
                    let portion = Array(rows.prefix(sending.begin(host)))
                    group.addTask { await self.send(portion, to: host, sending) }
                }
                // Behind these may wait those of other hosts.
                if rows.count == limit { outboxContinuation.yield() }
            }
        }
    }

    /// Their host was forgotten since: the tasks wait until it has a key again.
    private func park(_ rows: [OutboxRecord]) async throws {
        try await decide { transitions in
            for row in rows {
                try transitions.store.markSent(row.id, at: transitions.now)
                guard let task = try transitions.store.task(id: row.identity.task),
                    task.machine.fence == row.identity.fence
                else { continue }
                _ = try transitions.apply(.orphaned, to: task)
            }
        }
    }

    private func send(_ rows: [OutboxRecord], to host: String, _ sending: Sending) async {
        var messages = rows.map { $0.message(settings.names) }
        // One whose validity ends before its host took the task on is refused there, and another attempt is issued.
        member.sign(&messages, for: host, validity: settings.taskValidity)
        let outcomes = await withTaskGroup { group in
            for (row, message) in zip(rows, messages) {
                group.addTask { Outcome(row: row, error: await self.send(message, of: row)) }
            }
            return await group.reduce(into: []) { $0.append($1) }
        }
        let isDone = outcomes.allSatisfy { $0.error == nil }
        sending.note(outcomes, endOf: isDone ? host : nil)
        outboxContinuation.yield()
        if isDone { return }
        // The bus has tried for long already; what it could not send stays in the outbox.
        try? await Task.sleep(for: settings.tick)
        sending.note([], endOf: host)
        outboxContinuation.yield()
    }

    /// Returns the reason for which it could not be sent.
    private func send(_ message: Message, of row: OutboxRecord) async -> MigrationError? {
        do {
            guard row.body.count <= Message.maximumBody else {
                throw MigrationError(
                    .invalidArgument,
                    "\(row.identity): its request has \(row.body.count) bytes, a message holds \(Message.maximumBody)")
            }
            try await bus.publish(message)
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

extension OutboxRecord {
    fileprivate func message(_ names: Names) -> Message {
        var call = TaskCall(identity: identity, method: method, audience: host, deadline: deadline, body: body)
        call.traceparent = identity.traceparent
        return call.message(names, messageID: id)
    }
}

private typealias Outcome = (row: OutboxRecord, error: MigrationError?)

/// The hosts to which something is on its way, and what has come of it since this was last asked.
///
/// All that is on its way shares the bus's window of unconfirmed messages, and what a queue doesn't take stays there for
/// long. So a host's portion starts small, doubles with each that is taken, and is a single task after one that isn't.
private final class Sending: Sendable {
    private let state = Mutex<(hosts: Set<String>, outcomes: [Outcome])>(([], []))
    private let portions = Mutex<[String: Int]>([:])

    /// Returns how many may be sent.
    func begin(_ host: String) -> Int {
        state.withLock { _ = $0.hosts.insert(host) }
        return portions.withLock { $0[host, default: 32] }
    }

    /// - Parameter host: to which nothing is on its way any more.
    func note(_ outcomes: [Outcome], endOf host: String?) {
        for (host, outcomes) in Dictionary(grouping: outcomes, by: \.row.host) {
            let isTaken = outcomes.allSatisfy { $0.error == nil }
            portions.withLock { $0[host] = isTaken ? min($0[host, default: 32] * 2, 256) : 1 }
        }
        state.withLock { state in
            state.outcomes += outcomes
            if let host { state.hosts.remove(host) }
        }
    }

    func next() -> ([Outcome], Set<String>) {
        state.withLock { state in
            defer { state.outcomes = [] }
            return (state.outcomes, state.hosts)
        }
    }
}
