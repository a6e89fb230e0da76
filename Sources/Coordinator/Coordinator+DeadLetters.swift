import FlotillaProtocol
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf

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

    /// Oldest first. They stay where they are.
    func deadLetters(limit: Int) async throws -> [DeadLetter] {
        let letters = try await bus.peek(settings.names.dead, limit: limit)
        let rejections = try await store.write { try $0.rejections(limit: 10_000) }
        let byMessage = Dictionary(
            rejections.map { (Key($0.rejected.queue, $0.rejected.messageID, $0.rejected.type), $0) },
            uniquingKeysWith: { newest, _ in newest })
        return letters.map { letter in
            let queue = letter.headers[Message.Death.queue]?.string ?? ""
            let rejection = byMessage[Key(queue, letter.messageID, letter.type)]
            return .with {
                $0.messageID = letter.messageID
                $0.queue = queue
                $0.type = letter.type
                $0.taskID = letter.correlationID
                $0.bytes = UInt64(letter.bodySize)
                if let rejection {
                    $0.reason = rejection.rejected.reason
                    $0.rejectedBy = rejection.member
                    $0.rejectedAt = rejection.at.timestamp
                } else {
                    $0.reason = letter.headers[Message.Death.reason]?.string ?? "unknown"
                }
            }
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
    func replayDeadLetters(_ request: ReplayDeadLettersRequest) async throws -> ReplayDeadLettersResponse {
        let ids = request.messageIds.isEmpty ? nil : Set(request.messageIds)
        let count = try await bus.depth(of: settings.names.dead).ready
        var outcomes: [LetterOutcome] = []
        if request.dryRun {
            for letter in try await bus.peek(settings.names.dead, limit: count)
            where ids?.contains(letter.messageID) ?? true {
                outcomes.append(try await deal(with: letter, as: request))
            }
        } else if count > 0 || ids != nil {
            outcomes = try await takeDeadLetters(ids, count: count) { try await deal(with: $0, as: request) }
        }
        let missing = (ids ?? []).subtracting(outcomes.map(\.messageID))
        outcomes += missing.sorted().map { id in
            .with { ($0.messageID, $0.fate, $0.reason) = (id, .missing, "it is not among the dead letters") }
        }
        return .with { [outcomes] in $0.letters = outcomes }
    }

    /// Goes through the letters with these message ids, nil: all of the `count` that are there now. Those that `deal` keeps go
    /// back to their place.
    private func takeDeadLetters(
        _ ids: Set<String>?, count: Int, _ deal: (Messaging.Message) async throws -> LetterOutcome
    ) async throws -> [LetterOutcome] {
        // Besides those that are there, some that come back from other hands. Letters that are passed over go by at
        // once; of those that are made up for, which takes its time, only so many are held in memory.
        let prefetch = ids == nil ? min(count + 64, 256) : count + 64
        let letters = try await bus.subscribe(settings.names.dead, prefetch: prefetch)
        @Sendable func stop(in time: Duration) -> Task<Void, any Error> {
            Task {
                try await Task.sleep(for: time)
                letters.cancel()
            }
        }
        // Somebody else may empty the queue meanwhile: what was not taken goes back.
        var timers = [stop(in: .seconds(10))]
        defer {
            for timer in timers { timer.cancel() }
            letters.cancel()
        }
        // Who looks at letters takes them for a moment: one that is missing may come back.
        func lookOnForAWhile() { timers.append(stop(in: .seconds(2))) }
        if count == 0 { lookOnForAWhile() }
        var outcomes: [LetterOutcome] = []
        var seen = 0
        var missing = ids ?? []
        for await letter in letters.deliveries {
            seen += 1
            let id = letter.message.messageID
            if ids?.contains(id) ?? true {
                missing.remove(id)
                let outcome = try await deal(letter.message)
                outcomes.append(outcome)
                // Not settled: it goes back to its place when this subscription ends.
                if outcome.fate != .kept { await letter.settle(.ack) }
            }
            if missing.isEmpty, ids != nil || seen == count { break }
            // Each that is kept takes one's place.
            if ids == nil, outcomes.count(where: { $0.fate == .kept }) == prefetch {
                let reason = "\(count - seen) more are behind these: discard these by their ids first"
                outcomes.append(.with { ($0.fate, $0.reason) = (.kept, reason) })
                break
            }
            if seen == count { lookOnForAWhile() }
        }
        return outcomes
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
