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
        }

        private func row(_ host: Host) -> [String] {
            let profile = host.profile
            return [
                profile.name, host.hasSeenAt ? "\(age(host.seenAt.moment)) ago" : "never",
                host.clockText, host.drained ? "drained" : "open", "\(host.tasks)", "\(profile.cpus)",
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

        func run() async throws {
            let hosts = try await fleet.connect { try await $0.listHosts(.init()) }.hosts
            guard let host = hosts.first(where: { $0.profile.name == name }) else {
                throw MigrationError(
                    .notFound, "no worker of a host \(name) has been heard of",
                    hint: "flotilla host list shows those that have")
            }
            Console.line(try host.jsonString())
        }
    }

    struct Drain: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Gives a host no new tasks; those it has go on.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The host's name.") var name: String

        func run() async throws {
            let host = try await fleet.connect { try await $0.drainHost(.with { $0.name = name }) }
            Console.line("\(name) is drained; \(host.tasks) of its tasks go on")
        }
    }

    struct Undrain: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Gives a drained host tasks again.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The host's name.") var name: String

        func run() async throws {
            _ = try await fleet.connect {
                try await $0.drainHost(
                    .with {
                        $0.name = name
                        $0.undrain = true
                    })
            }
            Console.line("\(name) is open")
        }
    }
}

extension Host {
    /// "right", "75 s behind".
    var clockText: String {
        guard hasClockAheadMs else { return "-" }
        let seconds = abs(clockAheadMs) / 1000
        return seconds < 2 ? "right" : "\(seconds) s \(clockAheadMs > 0 ? "ahead" : "behind")"
    }
}
