import Convert
import Coordinator
import FlotillaProtocol
import GRPCCore
import Glibc
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import Worker

/// Submits the migrations, follows them to their ends, and shows it.
struct MigrateRun {
    let requests: [SubmitMigrationRequest]
    let libvirtURI: String
    let pool: String
    let stateDirectory: String
    let isDryRun: Bool
    let output: OutputStyle
    let verbose: Bool
    /// Bytes per second that all disks together may be read with.
    let rate: UInt64?
    var vsphere: [VSphereSource] = []

    func run() async throws -> Exit {
        let signals = Signals(SIGINT, SIGTERM)
        // Records and images are for the person who runs this, and for libvirt, which takes what it needs.
        umask(0o077)
        var logger = Logger(label: "flotilla") { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = verbose ? .debug : .error

        // A dry run leaves no trace, not even records.
        let folder = isDryRun ? try temporaryDirectory() : stateDirectory
        defer { if isDryRun { try? Files.remove(folder) } }
        let fleet = EmbeddedFleet(
            libvirtURI: libvirtURI, pool: pool, stateDirectory: folder, logger: logger,
            rateLimit: rate.map { RateLimit(bytesPerSecond: $0) }, vsphere: vsphere,
            recoversDevices: !isDryRun)
        let view = output.view()
        let migrations = try await fleet.run(interrupted: { await signals.first() }) { client in
            let migrations = try await follow(requests, client, view)
            return (migrations, Set(migrations.map(\.id)))
        }
        view.finish(migrations)
        return Exit(migrations)
    }

    private func temporaryDirectory() throws -> String {
        let base = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
        var template = Array("\(base)/flotilla-dry-run-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw systemError("create a folder in", base) }
        return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

extension Exit {
    /// The worst of several: what failed for good before what may go on, before what never began.
    ///
    /// - Parameter isRollback: whether it was asked for that they be taken back.
    init(_ migrations: [Migration], isRollback: Bool = false) {
        let exits = migrations.map { migration -> Exit in
            switch migration.state {
            case .done, .ready: .done
            case .rolledBack: isRollback ? .done : .cancelled
            case .preflightBlocked: .blocked
            case .cancelled: .cancelled
            default:
                Exit(MigrationError(.init(rawValue: Int(migration.errorCode)) ?? .unknown, migration.errorMessage))
            }
        }
        self = [.failed, .tryAgain, .blocked, .cancelled].first(where: exits.contains) ?? .done
    }
}
