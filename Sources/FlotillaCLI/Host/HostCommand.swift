import ArgumentParser
import FlotillaProtocol
import GRPCCore
import HostKit
import MigrationModel
import SwiftProtobuf

struct HostCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "host", abstract: "The fleet's hosts: what they have, and whether they get tasks.",
        subcommands: [
            List.self, Show.self, HostProfileCommand.self, Drain.self, Undrain.self, HostEnrollCommand.self,
            HostForgetCommand.self,
        ])

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the hosts whose worker was heard of.")

        @OptionGroup var fleet: FleetOptions
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let response = try await fleet.connect { try await $0.listHosts(.init()) }
            if json { return Console.line(try response.jsonString()) }
            let head = [
                "host", "heard of", "clock", "state", "tasks", "cpus", "memory", "free in pools", "IOMMU", "domains",
            ]
            for line in table(head, response.hosts.map(row)) { Console.line(line) }
            for host in response.hosts where host.forgotten {
                Console.complain("\(host.profile.name): \(Host.forgottenText); \(Host.forgottenRemedy)")
            }
        }

        private func row(_ host: Host) -> [String] {
            let profile = host.profile
            return [
                profile.name, host.hasSeenAt ? "\(age(host.seenAt.moment)) ago" : "never",
                host.clockText, host.stateText, "\(host.tasks)", "\(profile.cpus)",
                byteText(profile.memoryBytes),
                profile.pools.map { "\($0.name) \(byteText($0.freeBytes))" }.joined(separator: ", "),
                profile.iommuEnabled ? "on" : "off", "\(profile.domains.count)",
            ]
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Shows all that is known of a host, as JSON.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The host's name.") var name: String
        @Flag(help: "As without it.") var json = false

        func validate() throws { try requireHostName(name) }

        func run() async throws {
            Console.line(try await fleet.host(name).jsonString())
        }
    }

    struct Drain: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Gives a host no new tasks; those it has go on.")

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var change: Change

        func run() async throws {
            let host = try await change.make(fleet, undrain: false)
            Console.line("\(change.name) \(change.verb) drained; \(host.tasks) of its tasks go on")
        }
    }

    struct Undrain: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Gives a drained host tasks again.")

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var change: Change

        func run() async throws {
            _ = try await change.make(fleet, undrain: true)
            Console.line("\(change.name) \(change.verb) open")
        }
    }

    struct Change: ParsableArguments {
        @Argument(help: "The host's name.") var name: String
        @Flag(help: "Change nothing; say what would be.") var dryRun = false

        func validate() throws { try requireHostName(name) }

        var verb: String { dryRun ? "would be" : "is" }

        /// The host as it is then or, of a dry run, now.
        func make(_ fleet: FleetOptions, undrain: Bool) async throws -> Host {
            if dryRun { return try await fleet.host(name) }
            return try await fleet.connect { [name] in
                try await $0.drainHost(.with { ($0.name, $0.undrain) = (name, undrain) })
            }
        }
    }
}

extension FleetOptions {
    /// Throws `notFound` for one that the coordinator does not know.
    fileprivate func host(_ name: String) async throws -> Host {
        let hosts = try await connect { try await $0.listHosts(.init()) }.hosts
        guard let host = hosts.first(where: { $0.profile.name == name }) else {
            throw MigrationError(
                .notFound, "no worker of a host \(name) has been heard of",
                hint: "flotilla host list shows those that have")
        }
        return host
    }
}

extension Host {
    static let forgottenText = "the coordinator has no key of it: it gets no tasks, and what it says isn't heard"
    static let forgottenRemedy =
        "let it join again with flotilla host enroll; or stop its worker there, and delete its broker user and queues "
        + "(flotilla host forget shows how)"

    fileprivate var stateText: String { forgotten ? "forgotten" : drained ? "drained" : "open" }

    /// "right", "75 s behind".
    var clockText: String {
        guard hasClockAheadMs else { return "-" }
        let seconds = abs(clockAheadMs) / 1000
        return seconds < 2 ? "right" : "\(seconds) s \(clockAheadMs > 0 ? "ahead" : "behind")"
    }
}
