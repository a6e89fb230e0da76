import ArgumentParser
import Export
import FlotillaProtocol
import GRPCCore
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import VSphere

struct MigrationCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "migration", abstract: "The fleet's migrations.",
        subcommands: [Submit.self, List.self, Show.self, Watch.self, Cancel.self, Retry.self, Rollback.self])

    struct Submit: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Has a host migrate VMs, and shows it until they are done.",
            discussion: """
                SOURCE is as for flotilla migrate, with paths as the host has them. Interrupting this command does not \
                stop the migration; the same command shows it again.
                """)

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var options: MigrationOptions
        @OptionGroup var transfer: VSphereTransfer
        @Argument(help: ArgumentHelp("What to migrate.", valueName: "source")) var sources: [String]
        @Option(name: .customLong("vm"), help: "Name of the VM within a source that holds several.") var vm: String?
        @Option(help: "Name of the domain, when one VM is migrated (default: the VM's name).") var name: String?
        @Option(help: "Name of the host that does it and gets the VMs.") var host: String
        @Option(help: "Name of the host's pool for the disks.") var pool: String
        @Flag(help: "Return as soon as the coordinator has it.") var detach = false
        @Flag(help: "Print JSON.") var json = false

        func validate() throws {
            try requireHostName(host)
            for source in sources { try validateVM(vm, of: source) }
            guard let name else { return }
            guard isValidDomainName(name) else { throw ValidationError("'\(name)' can't be a domain's name") }
            if sources.count > 1 { throw ValidationError("--name goes with one VM only") }
        }

        func run() async throws {
            let requests = try sources.map { source in
                var request = SubmitMigrationRequest()
                (request.vmName, request.host, request.pool) = (vm ?? "", host, pool)
                if VSphereURL.isOne(source) {
                    var url = try VSphereURL(parsing: source)
                    if vm == nil { request.vmName = url.vm ?? "" }
                    url.vm = nil
                    try transfer.apply(to: &url)
                    request.sourceURL = url.description
                } else {
                    let url = try SourceURL(parsing: source)
                    request.sourceURL = "\(url.kind.rawValue):\(url.path)"
                }
                request.options.domainName = name ?? ""
                options.apply(to: &request)
                return request
            }
            let view = OutputStyle(json: json).view()
            let migrations = try await fleet.connect { client in
                guard detach else { return try await follow(requests, client, view) }
                for request in requests {
                    // Said at once: what comes next may be refused.
                    let migration = try await client.submitMigration(request)
                    Console.line(json ? try migration.jsonString() : migration.id)
                }
                return []
            }
            if detach { return }
            view.finish(migrations)
            let exit = Exit(migrations)
            if exit != .done { throw ExitCode(exit.rawValue) }
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists migrations, newest first.")

        @OptionGroup var fleet: FleetOptions
        @Option(help: "How many.") var limit: UInt32 = 100
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let response = try await fleet.connect { try await $0.listMigrations(.with { $0.limit = limit }) }
            if json { return Console.line(try response.jsonString()) }
            let rows = response.migrations.map {
                [
                    $0.id, $0.title, $0.request.host, "\($0.state)",
                    ($0.stages.last.map { "\($0.name) \($0.state)" } ?? "-")
                        + ($0.waitsForHost == nil ? "" : ", host has no key"), "\(age($0.updatedAt.moment)) ago",
                ]
            }
            for line in table(["migration", "VM", "host", "state", "stage", "changed"], rows) { Console.line(line) }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Shows one migration.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The migration's id.") var id: String
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let migration = try await fleet.connect { try await $0.getMigration(.with { $0.id = id }) }
            Console.line(json ? try migration.jsonString() : Summary([migration]).text)
        }
    }

    struct Watch: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Shows a migration until it is done.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The migration's id.") var id: String
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let view = OutputStyle(json: json).view()
            let (migration, isRollback) = try await fleet.connect { client in
                let present = try await client.getMigration(.with { $0.id = id })
                let isRollback = [.rollingBack, .rolledBack].contains(present.state)
                return (try await watch(present, client, view), isRollback)
            }
            view.finish([migration])
            let exit = Exit([migration], isRollback: isRollback)
            if exit != .done { throw ExitCode(exit.rawValue) }
        }
    }

    struct Cancel: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Stops a migration. What it made so far is cleaned up.",
            discussion: """
                One that failed in its conversion keeps what was converted, for a retry to go on with; cancelled, it \
                does not. Of a deploy the host takes back what was made: domain, devices, vGPUs; the disks stay. Where \
                no worker answers any more, a second cancel ends the wait, and leaves that to flotilla migration \
                rollback.
                """)

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The migration's id.") var id: String

        func run() async throws {
            let migration = try await fleet.connect { try await $0.cancelMigration(.with { $0.id = id }) }
            if migration.state == .rollingBack {
                Console.line(
                    "\(migration.title): \(migration.request.host) takes back what was made; "
                        + "flotilla migration watch \(id) shows it")
            } else {
                let isSwept =
                    [.failed, .preflightBlocked].contains(migration.state)
                    && migration.stages.contains { $0.name == "convert" && $0.state == "cancelled" }
                Console.line(
                    "\(migration.title): \(migration.state)"
                        + (isSwept ? "; \(migration.request.host) removes what its conversion left" : ""))
            }
        }
    }

    struct Rollback: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Takes a migration back: undefines its domain and returns its GPUs.",
            discussion: """
                The guest is asked to shut down first; one that does not within a minute keeps running, and nothing is \
                changed. The disks stay, and the source is not touched.
                """)

        @OptionGroup var fleet: FleetOptions
        @OptionGroup var options: RollbackOptions
        @Argument(help: "The migration's id.") var id: String
        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let (options, id) = (options, id)
            try await showRollback(options, json: json) { view in
                try await fleet.connect { [try await rollBack(id, options, $0, view)] }
            }
        }
    }

    struct Retry: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Has a failed migration done again.")

        @OptionGroup var fleet: FleetOptions
        @Argument(help: "The migration's id.") var id: String
        @Option(
            help: ArgumentHelp("When it must have ended, as for submit (default: whenever).", valueName: "time"))
        var deadline: DeadlineArgument?

        func run() async throws {
            var request = RetryMigrationRequest.with { $0.id = id }
            if let deadline { request.deadline = deadline.moment.timestamp }
            let migration = try await fleet.connect { [request] in try await $0.retryMigration(request) }
            Console.line("\(migration.title): \(migration.state)")
        }
    }
}
