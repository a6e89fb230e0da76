import ArgumentParser
import FlotillaProtocol
import Glibc
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf

struct RollbackOptions: ParsableArguments {
    @Flag(help: "Change nothing; say what would be taken back.") var dryRun = false
    @Flag(help: "Cut the power of a guest that runs.") var force = false

    static func of(dryRun: Bool, force: Bool) -> RollbackOptions {
        var options = RollbackOptions()
        (options.dryRun, options.force) = (dryRun, force)
        return options
    }
}

/// Has the host take a migration back, and shows it until that is done.
func rollBack(
    _ id: String, _ options: RollbackOptions, _ client: some CoordinatorService.ClientProtocol,
    _ view: any MigrationView
) async throws -> Migration {
    do {
        let migration = try await client.rollbackMigration(
            .with { ($0.id, $0.dryRun, $0.force) = (id, options.dryRun, options.force) })
        return options.dryRun ? migration : try await watch(migration, client, view)
    } catch let error as RPCError {
        throw MigrationError(error)
    }
}

/// Runs a rollback and prints what it did or, of a dry run, would do.
func showRollback(
    _ options: RollbackOptions, json: Bool, _ body: (any MigrationView) async throws -> [Migration]
) async throws {
    let view = OutputStyle(json: json).view()
    let migrations = try await body(view)
    if options.dryRun {
        for migration in migrations {
            if json { Console.line(try migration.jsonString()) } else { planned(migration).forEach(Console.line) }
        }
        return
    }
    view.finish(migrations)
    let exit = Exit(migrations, isRollback: true)
    if exit != .done { throw ExitCode(exit.rawValue) }
}

private func planned(_ migration: Migration) -> [String] {
    let result = migration.result
    let domain =
        result.domainName.isEmpty ? migration.request.options.domainName(for: migration.manifest.vm) : result.domainName
    var lines = ["\(migration.title)  nothing was changed; a rollback would"]
    lines.append("  shut down and undefine domain \(domain) on \(migration.request.host), if it is there")
    for vgpu in result.vgpus { lines.append("  destroy the vGPU \(vgpu.profile) on \(vgpu.function)") }
    for device in result.devices { lines.append("  give back \(device), which stays reserved until it was reset") }
    for disk in migration.manifest.disks where disk.hasTarget { lines.append("  leave \(disk.target.path) as it is") }
    lines.append("  leave the source, \(migration.request.sourceURL), as it is")
    return lines
}

/// Takes back what `flotilla migrate` did in this state folder.
struct RollbackRun {
    let requests: [SubmitMigrationRequest]
    let fleet: EmbeddedFleet
    let options: RollbackOptions

    func run(_ view: any MigrationView) async throws -> [Migration] {
        guard Files.exists("\(fleet.stateDirectory)/flotilla.sqlite") else {
            throw MigrationError(
                .notFound, "\(fleet.stateDirectory) has no migrations",
                hint: "name the folder the migration was run with, with --state")
        }
        let signals = Signals(SIGINT, SIGTERM)
        umask(0o077)
        return try await fleet.run(interrupted: { await signals.first() }) { client in
            let known: [Migration]
            do { known = try await client.listMigrations(ListMigrationsRequest()).migrations } catch let error
                as RPCError
            {
                throw MigrationError(error)
            }
            // All are found before the first is taken back.
            let chosen = try requests.map { request in
                guard let migration = known.first(where: { $0.request.isSame(as: request) }) else {
                    throw MigrationError(
                        .notFound,
                        "\(request.sourceURL) was not migrated to \(request.host) and \(request.pool): nothing was taken back",
                        hint: "give the options it was migrated with: --host, --pool, --vm, --name, --state")
                }
                return migration.id
            }
            var ended: [Migration] = []
            for id in chosen { ended.append(try await rollBack(id, options, client, view)) }
            return (ended, Set(ended.map(\.id)))
        }
    }
}

extension SubmitMigrationRequest {
    /// Names the same migration, as the coordinator tells them apart.
    fileprivate func isSame(as other: SubmitMigrationRequest) -> Bool {
        sourceURL == other.sourceURL && vmName == other.vmName && host == other.host && pool == other.pool
            && options.domainName == other.options.domainName
    }
}
