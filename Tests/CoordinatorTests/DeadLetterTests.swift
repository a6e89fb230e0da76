import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// What becomes of dead letters, told of each.
@Suite(.timeLimit(.minutes(1))) struct DeadLetterTests {
    /// A lost task, and a forged word about it: a dry run foresees for both what the replay then does.
    @Test func replayDoesWhatItsDryRunSaid() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let lost = try await worker.reject()
            let foreseen = try await client.replay(isDry: true)
            #expect(foreseen.letters.map(\.fate) == [.sentAgain])
            #expect(foreseen.letters.map(\.taskID) == [lost.identity.task])
            #expect(foreseen.letters.map(\.queue) == ["flotilla.tasks.\(Rig.host)"])
            #expect(try await client.attempt(of: migration.id) == 1)
            #expect(try await client.listDeadLetters(.init()).letters.count == 1)

            #expect(try await client.replay() == foreseen)
            let again = try await worker.take()
            #expect(again.identity.task == lost.identity.task && again.identity.attempt == 2)
            #expect(try await client.listDeadLetters(.init()).letters.isEmpty)

            try await worker.accept(again)
            #expect(try await eventually { try await client.stage(of: migration.id) == "running" ? true : nil } == true)
            try await worker.forge(.ended(.with { $0.code = 15 }), of: again)
            #expect(try await eventually { try await client.listDeadLetters(.init()).letters.first } != nil)
            let useless = try await client.replay(isDry: true)
            #expect(useless.letters.map(\.fate) == [.withoutEffect] && useless.letters[0].reason.isEmpty == false)
            #expect(try await client.replay() == useless)
            #expect(try await client.stage(of: migration.id) == "running")
            #expect(try await client.attempt(of: migration.id) == 2)
            #expect(try await client.listDeadLetters(.init()).letters.isEmpty)
        }
    }

    /// The task waits, but for a later attempt than the letter's; and no worker's word is an attempt.
    @Test func letterOfAnOlderAttemptDisturbsNoNewerOne() async throws {
        let rig = try Rig()
        let bus = InProcessBus()
        try await rig.process(on: bus) { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let lost = try await worker.reject()
            #expect(try await client.replay().letters.map(\.fate) == [.sentAgain])
            var old = lost.message(Names(), messageID: "old")
            rig.members.coordinator.sign(&old, for: lost.audience, validity: .seconds(60))
            old.exchange = Names().dead
            var word = Messaging.Message(exchange: Names().dead, routingKey: "", body: [1])
            (word.messageID, word.type, word.correlationID) = ("word", EventPublisher.messageType, lost.identity.task)
            for letter in [old, word] { try await bus.publish(letter) }

            let useless = try await client.replay(isDry: true)
            #expect(useless.letters.map(\.fate) == [.withoutEffect, .withoutEffect])
            #expect(useless.letters.first?.reason.contains("attempt 2") == true)
            #expect(try await client.replay() == useless)
            let current = try await worker.take()
            #expect(current.identity.attempt == 2)
            try await worker.accept(current)
            #expect(try await eventually { try await client.stage(of: migration.id) == "running" ? true : nil } == true)
            #expect(try await client.attempt(of: migration.id) == 2)
        }
    }

    /// A letter may have a megabyte, and there may be many of them before the one that is looked for.
    @Test func lettersAreHeldOneAtATime() async throws {
        let bus = WatchedBus()
        try await Rig().process(on: bus) { client, _ in
            for number in 0..<300 {
                var letter = Messaging.Message(exchange: Names().dead, routingKey: "", body: [1])
                letter.messageID = "\(number)"
                try await bus.publish(letter)
            }
            for isDry in [true, false] {
                let found = try await client.replay(["7", "299"], discards: true, isDry: isDry).letters
                #expect(found.map(\.messageID) == ["7", "299"] && found.allSatisfy { $0.fate == .discarded })
            }
            let left = (0..<299).filter { $0 != 7 }.map(String.init)
            #expect(try await client.listDeadLetters(.with { $0.limit = 1000 }).letters.map(\.messageID) == left)
            #expect(try await client.replay(discards: true).letters.map(\.messageID) == left)
            #expect(try await client.listDeadLetters(.init()).letters.isEmpty)
            #expect(bus.prefetches(of: Names().dead) == [])
        }
    }

    /// A broker has those that somebody looked at in any order, and one that died nowhere is as old as can be.
    @Test func lettersAreListedOldestFirst() async throws {
        let bus = InProcessBus()
        try await Rig().process(on: bus) { client, _ in
            for (number, age) in [5, 9, 1, 7, 3, nil as Int64?].enumerated() {
                var letter = Messaging.Message(exchange: Names().dead, routingKey: "", body: [1])
                letter.messageID = "\(number)"
                letter.headers[Messaging.Message.Death.time] = age.map { .integer(Moment.now.milliseconds - $0 * 1000) }
                try await bus.publish(letter)
            }
            let all = try await client.listDeadLetters(.init())
            #expect(all.letters.map(\.messageID) == ["5", "1", "3", "0", "4", "2"] && all.total == 6)
            #expect(all.letters.map(\.hasDiedAt) == [false, true, true, true, true, true])
            let some = try await client.listDeadLetters(.with { $0.limit = 2 })
            #expect(some.letters.map(\.messageID) == ["5", "1"] && some.total == 6)
        }
    }

    @Test func dryDiscardLeavesAll() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            _ = try await worker.reject()
            let id = try await client.listDeadLetters(.init()).letters[0].messageID
            let foreseen = try await client.replay([id, "no-such"], discards: true, isDry: true)
            #expect(foreseen.letters.map(\.messageID) == [id, "no-such"])
            #expect(foreseen.letters.map(\.fate) == [.discarded, .missing])
            #expect(try await client.listDeadLetters(.init()).letters.map(\.messageID) == [id])
            #expect(try await client.replay([id], discards: true).letters.map(\.fate) == [.discarded])
            #expect(try await client.listDeadLetters(.init()).letters.isEmpty)
            #expect(try await client.attempt(of: migration.id) == 1)
        }
    }
}

extension Rig.Client {
    /// All of them without ids.
    func replay(
        _ ids: [String] = [], discards: Bool = false, isDry: Bool = false
    ) async throws -> ReplayDeadLettersResponse {
        let request = ReplayDeadLettersRequest.with { ($0.messageIds, $0.discard, $0.dryRun) = (ids, discards, isDry) }
        return try await replayDeadLetters(request) { response in
            try await response.messages.reduce(into: .init()) { $0.letters += $1.letters }
        }
    }

    /// State of its first one.
    fileprivate func stage(of id: String) async throws -> String {
        try await getMigration(.with { $0.id = id }).stages[0].state
    }
}
