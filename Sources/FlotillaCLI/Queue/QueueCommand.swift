import ArgumentParser
import FlotillaProtocol
import GRPCCore
import HostKit
import MigrationModel
import SwiftProtobuf
import Synchronization

struct QueueCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "queue", abstract: "The fleet's queues and dead letters.",
        subcommands: [Status.self, Dead.self, Replay.self, Discard.self])

    struct Status: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the queues and what waits in them.")

        @OptionGroup var fleet: FleetOptions
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let response = try await fleet.connect { try await $0.listQueues(.init()) }
            if json { return Console.line(try response.jsonString()) }
            let rows = response.queues.map { [$0.name, "\($0.messages)", "\($0.consumers)"] }
            for line in table(["queue", "waiting", "consumers"], rows) { Console.line(line) }
        }
    }

    struct Dead: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Lists messages that nobody could take, with the reason. They stay.")

        @OptionGroup var fleet: FleetOptions
        @Option(help: "How many, oldest first; 10000 at most.") var limit: UInt32 = 100
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let response = try await fleet.connect { try await $0.listDeadLetters(.with { $0.limit = limit }) }
            if json { return Console.line(try response.jsonString()) }
            if response.letters.isEmpty { return Console.line("no dead letters") }
            let rows = response.letters.map {
                [
                    $0.messageID.isEmpty ? "-" : $0.messageID, $0.queue, $0.hasDiedAt ? age($0.diedAt.moment) : "-",
                    $0.rejectedBy.isEmpty ? "-" : $0.rejectedBy, $0.reason,
                ]
            }
            for line in table(["message", "queue", "age", "rejected by", "reason"], rows) { Console.line(line) }
            if response.total > rows.count {
                let more = rows.count < limit ? "the others when these are replayed or discarded" : "more with --limit"
                Console.complain("shown: \(rows.count) of \(response.total) dead letters, \(more)")
            }
        }
    }

    struct Replay: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Has the tasks of dead letters done again and removes the letters.",
            discussion: """
                Nothing old is sent again: a task that still waits for the lost message gets a new attempt, with a new \
                signature. A letter whose task has moved on is just removed. One that is too large to be read stays, and \
                the command exits 1: flotilla queue discard removes it.
                """)

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var letters: Letters

        func run() async throws { try await letters.take(fleet, discards: false) }
    }

    struct Discard: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Throws dead letters away.",
            discussion: "A task that still waits for such a message is sent again when its host shows that it lives.")

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var letters: Letters

        func run() async throws { try await letters.take(fleet, discards: true) }
    }

    struct Letters: ParsableArguments {
        @Argument(help: ArgumentHelp("Message ids, as queue dead shows them.", valueName: "message")) var ids:
            [String] = []
        @Flag(help: "All dead letters.") var all = false
        @Flag(help: "Change nothing; say what would become of each letter.") var dryRun = false
        @Flag(help: "Print JSON.") var json = false

        func validate() throws {
            if ids.isEmpty != all { throw ValidationError("Name messages, or --all") }
        }

        /// Says what becomes of each as it happens: of many, that takes minutes.
        func take(_ fleet: FleetOptions, discards: Bool) async throws {
            let request = ReplayDeadLettersRequest.with {
                ($0.messageIds, $0.discard, $0.dryRun) = (ids, discards, dryRun)
            }
            let told = Mutex<[LetterOutcome]>([])
            var failure: (any Error)?
            do {
                try await fleet.connect { [self] client in
                    try await client.replayDeadLetters(request) { response in
                        for try await part in response.messages {
                            let count = told.withLock { told in
                                told += part.letters
                                return told.count
                            }
                            if !json { part.letters.forEach(show) }
                            if json, count.isMultiple(of: 1000) { Console.complain("letters so far: \(count)") }
                        }
                    }
                }
            } catch { failure = error }
            let letters = told.withLock { $0 }
            if json {
                Console.line(try ReplayDeadLettersResponse.with { $0.letters = letters }.jsonString())
            } else {
                let taken = letters.count { !$0.isLeft }
                Console.line(
                    dryRun
                        ? "nothing was changed; letters that would be removed: \(taken)" : "letters removed: \(taken)")
            }
            if let failure { throw failure }
            if letters.contains(where: \.isLeft) { throw ExitCode(Exit.failed.rawValue) }
        }

        private func show(_ letter: LetterOutcome) {
            if letter.isLeft {
                Console.complain("not touched: \(letter.name): \(letter.reason)")
            } else {
                Console.line("\(letter.name): \(letter.told(isDryRun: dryRun))")
            }
        }
    }
}

extension LetterOutcome {
    fileprivate var name: String { messageID.isEmpty ? "-" : messageID }

    /// It stays, or never was there.
    fileprivate var isLeft: Bool { fate == .kept || fate == .missing }

    fileprivate func told(isDryRun: Bool) -> String {
        let will = isDryRun ? "would be " : ""
        return switch fate {
        case .sentAgain: "task \(taskID) \(isDryRun ? "would be" : "is") sent again"
        case .heard: "\(will)heard now"
        case .withoutEffect: "\(will)removed without effect: \(reason)"
        case .discarded: "\(will)thrown away"
        case .kept, .missing, .unspecified, .UNRECOGNIZED: reason
        }
    }
}
