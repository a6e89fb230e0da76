import FlotillaProtocol
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import Synchronization

/// The queues as people see them, and what becomes of messages that nobody could take.
extension Coordinator {
    func queues() async throws -> [Queue] {
        let hosts = try await store.write { try $0.hosts() }.map(\.profile.name)
        let names = settings.names.topology(hosts: hosts).queues.map(\.name)
        let depths = try await bus.depths(of: names)
        // One that isn't there: a control queue that expired with its host.
        return names.compactMap { name in
            depths[name].map { depth in
                .with {
                    $0.name = name
                    $0.messages = UInt64(depth.ready)
                    $0.consumers = UInt32(depth.consumers)
                }
            }
        }
    }

    /// Letters that a listing looks at: some seconds' work.
    private static let mostListed = 10_000

    /// Oldest first, whatever order a broker has them in: it puts those that were looked at back as it likes. They stay.
    func deadLetters(limit: Int) async throws -> ListDeadLettersResponse {
        let total = try await bus.depth(of: settings.names.dead).ready
        let rejections = try await store.write { try $0.rejections(limit: 10_000) }
        let byMessage = Dictionary(
            rejections.map { (Key($0.rejected.queue, $0.rejected.messageID, $0.rejected.type), $0) },
            uniquingKeysWith: { newest, _ in newest })
        let letters = Mutex<[DeadLetter]>([])
        try await bus.look(through: settings.names.dead, limit: min(total, Self.mostListed)) { letter in
            let queue = letter.headers[Message.Death.queue]?.string ?? ""
            let rejection = byMessage[Key(queue, letter.messageID, letter.type)]
            let listed = DeadLetter.with {
                $0.messageID = letter.messageID
                $0.queue = queue
                $0.type = letter.type
                $0.taskID = letter.correlationID
                $0.bytes = UInt64(letter.bodySize)
                if let died = letter.headers[Message.Death.time]?.integer {
                    $0.diedAt = Moment(milliseconds: died).timestamp
                }
                if let rejection {
                    $0.reason = rejection.rejected.reason
                    $0.rejectedBy = rejection.member
                    $0.rejectedAt = rejection.at.timestamp
                } else {
                    $0.reason = letter.headers[Message.Death.reason]?.string ?? "unknown"
                }
            }
            letters.withLock { $0.append(listed) }
            return .leave
        }
        let found = letters.withLock { $0 }.enumerated().sorted { one, other in
            let (first, second) = (one.element.diedAt.moment, other.element.diedAt.moment)
            return first == second ? one.offset < other.offset : first < second
        }
        return .with {
            $0.letters = found.prefix(limit).map(\.element)
            $0.total = UInt64(total)
        }
    }

    private struct Key: Hashable {
        let queue, messageID, type: String

        init(_ queue: String, _ messageID: String, _ type: String) {
            (self.queue, self.messageID, self.type) = (queue, messageID, type)
        }
    }

    /// Takes letters out of the queue and makes up for them, unless they are only to be thrown away. What can't be made up for
    /// stays; a dry run leaves all.
    ///
    /// - Parameter tell: is told what becomes of each letter before the next is looked at.
    func replayDeadLetters(
        _ request: ReplayDeadLettersRequest, tell: @escaping @Sendable (LetterOutcome) async throws -> Void
    ) async throws {
        let missing = Mutex(Set(request.messageIds))
        let isAll = request.messageIds.isEmpty
        // Who looks at letters takes them for a moment: one that is missing may come back. Among very many, a look takes long.
        var looks = isAll || request.dryRun ? 1 : 8
        let end = ContinuousClock.now + .seconds(5)
        while true {
            let count = try await bus.depth(of: settings.names.dead).ready
            try await bus.look(through: settings.names.dead, limit: count) { letter in
                guard isAll || missing.withLock({ $0.contains(letter.messageID) }) else { return .leave }
                let outcome = try await self.deal(with: letter, as: request)
                try await tell(outcome)
                return missing.withLock { missing in
                    missing.remove(letter.messageID)
                    if request.dryRun || outcome.fate == .kept { return .leave }
                    return !isAll && missing.isEmpty ? .takeAsLast : .take
                }
            }
            looks -= 1
            if looks == 0 || .now > end || missing.withLock({ $0.isEmpty }) { break }
            try await Task.sleep(for: .milliseconds(250))
        }
        for id in missing.withLock({ $0.sorted() }) {
            try await tell(
                .with { ($0.messageID, $0.fate, $0.reason) = (id, .missing, "it is not among the dead letters") })
        }
    }

    /// Sends the task again that still waits for this letter, or hears an event that is believed by now; of a dry run, looks
    /// what that would come to. One that is too large to be read is kept.
    private func deal(
        with letter: Messaging.Message, as request: ReplayDeadLettersRequest
    ) async throws -> LetterOutcome {
        var outcome = LetterOutcome.with {
            $0.messageID = letter.messageID
            $0.queue = letter.headers[Message.Death.queue]?.string ?? ""
            $0.taskID = letter.correlationID
        }
        do {
            (outcome.fate, outcome.reason) = try await fate(of: letter, request)
        } catch let error as MigrationError where error.code == .invalidArgument {
            (outcome.fate, outcome.reason) = (.kept, error.message)
        }
        return outcome
    }

    private func fate(
        of letter: Messaging.Message, _ request: ReplayDeadLettersRequest
    ) async throws -> (LetterOutcome.Fate, reason: String) {
        if request.discard { return (.discarded, "") }
        try letter.requireSize()
        if let events = try? verified(letter) {
            if !request.dryRun { try await handle([events]) }
            return (.heard, "")
        }
        let id = letter.correlationID
        guard !id.isEmpty else { return (.withoutEffect, "it is about no task, and from nobody who is believed") }
        let lost = (try? TaskCall(decoding: letter, audience: letter.routingKey))?.identity
        return try await decide { transitions -> (LetterOutcome.Fate, reason: String) in
            guard let task = try transitions.store.task(id: id) else {
                return (.withoutEffect, "there is no task \(id)")
            }
            guard task.machine.state == .sent else {
                return (.withoutEffect, "task \(id) does not wait for it: it is \(task.machine.state.name)")
            }
            guard let lost else { return (.withoutEffect, "it is no attempt of task \(id)") }
            guard lost.fence == task.machine.fence else {
                let sent = "attempt \(task.machine.attempt) of task \(id) has been sent since"
                return (.withoutEffect, "it is attempt \(lost.attempt): \(sent)")
            }
            if !request.dryRun {
                let back = try transitions.apply(.orphaned, to: task)
                _ = try transitions.apply(.dispatch, to: back)
            }
            return (.sentAgain, "")
        }
    }
}
