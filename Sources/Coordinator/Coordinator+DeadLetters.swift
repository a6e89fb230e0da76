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

    /// Takes the letters with these message ids, nil: all that are there now, out of the queue and makes up for them,
    /// unless they are only to be thrown away. What can't be made up for stays.
    func replayDeadLetters(_ ids: Set<String>?, discards: Bool) async throws -> ReplayDeadLettersResponse {
        let count = try await bus.depth(of: settings.names.dead).ready
        var response = ReplayDeadLettersResponse()
        guard count > 0 || ids != nil else { return response }
        // Besides those that are there, some that come back from other hands.
        let letters = try await bus.subscribe(settings.names.dead, prefetch: count + 64)
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
        var seen = 0
        var missing = ids ?? []
        for await letter in letters.deliveries {
            seen += 1
            let id = letter.message.messageID
            if ids?.contains(id) ?? true {
                missing.remove(id)
                do {
                    if discards {
                        response.removed += 1
                    } else if let task = try await makeUp(for: letter.message) {
                        response.taskIds.append(task)
                    } else {
                        response.removed += 1
                    }
                    await letter.settle(.ack)
                } catch let error as MigrationError where error.code == .invalidArgument {
                    // Not settled: it goes back to its place when this subscription ends.
                    response.kept.append(.with { ($0.messageID, $0.reason) = (id, error.message) })
                }
            }
            if missing.isEmpty, ids != nil || seen == count { break }
            if seen == count { lookOnForAWhile() }
        }
        response.kept += missing.sorted().map { id in
            .with { ($0.messageID, $0.reason) = (id, "it is not among the dead letters") }
        }
        return response
    }

    /// Sends the task again that still waits for this message, or hears an event that is believed by now. Returns the
    /// task; nil when the letter is of no consequence any more. Throws `invalidArgument` for one that is too large.
    private func makeUp(for letter: Messaging.Message) async throws -> String? {
        try letter.requireSize()
        if let events = try? verified(letter) {
            try await handle([events])
            return nil
        }
        let id = letter.correlationID
        return try await decide { transitions in
            guard let task = try transitions.store.task(id: id), task.machine.state == .sent else { return nil }
            let back = try transitions.apply(.orphaned, to: task)
            _ = try transitions.apply(.dispatch, to: back)
            return task.id
        }
    }
}
