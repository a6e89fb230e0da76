import Deploy
import FlotillaProtocol
import GRPCCore
package import Logging
package import Messaging
import HostKit
import MigrationModel
import Passthrough

/// One KVM host's hands: serves the three stages from the host's queue. Start reading at `MigrationServices`.
package final class Worker: Sendable {
    private let configuration: WorkerConfiguration
    private let journal: Journal
    private let bus: any MessageBus
    private let transport: BusServerTransport
    private let logger: Logger
    private let server: GRPCServer<BusServerTransport>

    /// Opens the journal. Blocking.
    ///
    /// - Parameter member: this host's name and keys.
    package init(
        _ configuration: WorkerConfiguration, bus: any MessageBus, member: FleetMember, logger: Logger
    ) throws {
        self.configuration = configuration
        self.bus = bus
        self.logger = logger
        let pools = WorkPools(configuration.pools)
        let convert = ConvertService.Method.Convert.descriptor.fullyQualifiedMethod
        journal = try Journal(path: configuration.journalPath, answers: { $0 == convert }, logger: logger) {
            try pools.remove($0, keepsResult: $1)
        }
        var settings = configuration.transport
        settings.requireRequest = requireRequest
        settings.prompt = [DeployService.descriptor]
        let transport = BusServerTransport(
            bus: bus, names: configuration.names, member: member, settings: settings, ledger: journal, logger: logger)
        self.transport = transport
        let permit: @Sendable (String, CallIdentity) async throws -> Void = { try await transport.permit($0, for: $1) }
        server = GRPCServer(
            transport: transport,
            services: [
                ExportHandler(configuration: configuration),
                ConvertHandler(configuration: configuration, permit: permit),
                DeployHandler(
                    configuration: configuration, permit: permit, mayAct: { transport.mayAct($0) },
                    announce: { await Self.announceAgain(configuration, transport, logger) }),
            ],
            interceptors: [ErrorInterceptor()])
    }

    /// Tells the coordinator what this host is, again and again since it changes, and serves until `drain` or `stopNow`.
    /// Throws `unavailable` when libvirt can't be reached at the start: a worker without it would only fail its tasks.
    @concurrent
    package func run() async throws {
        await recoverDevices()
        try await bus.connected()
        try await Self.announce(configuration, transport)
        let suspects = journal.suspects(slots: configuration.transport.slots)
        await transport.release(journal.interrupted) { !suspects.contains($0.task) }
        await transport.republish()
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await self.configuration.keepSweepingExports(self.logger) }
            group.addTask { try await self.server.serve() }
            group.addTask {
                while true {
                    try await Task.sleep(for: self.configuration.inventoryInterval)
                    await Self.announceAgain(self.configuration, self.transport, self.logger)
                }
            }
            defer { group.cancelAll() }
            try await group.next()
        }
    }

    /// What can't be put right now is in the way of the devices it is about, of nothing else.
    private func recoverDevices() async {
        guard configuration.recoversDevices else { return }
        let underWay = Set(journal.interrupted.compactMap { Stage.migrationID(ofTask: $0.task) })
        do {
            let findings = try await blocking("gpu") { [configuration] in
                let connection = try LibvirtConnection(uri: configuration.libvirtURI)
                return try configuration.devices.recover(
                    libvirt: connection.uri,
                    domains: connection.deviceOwners(sysfs: configuration.devices.sysfs), underWay: underWay)
            }
            for finding in findings { logger.warning("\(finding.message)", metadata: ["device": "\(finding.subject)"]) }
        } catch let error as MigrationError where error.code == .unavailable {
            // Without libvirt nothing goes; what comes next says so.
        } catch {
            logger.error("devices not put right", metadata: ["error": "\(error)"])
        }
    }

    private static func announce(_ configuration: WorkerConfiguration, _ transport: BusServerTransport) async throws {
        let profile = try await blocking("inventory") {
            try hostProfile(
                name: configuration.host, connection: LibvirtConnection(uri: configuration.libvirtURI),
                pools: configuration.pools, devices: configuration.devices)
        }
        try await transport.publishInventory(profile)
    }

    /// What can't be told now is told the next time.
    private static func announceAgain(
        _ configuration: WorkerConfiguration, _ transport: BusServerTransport, _ logger: Logger
    ) async {
        do { try await announce(configuration, transport) } catch {
            logger.warning("inventory not published", metadata: ["error": "\(error)"])
        }
    }

    /// Returns once every result of these migrations is with the coordinator and cleaned up after, or when cancelled.
    package func settle(_ migrations: Set<String>) async {
        await journal.settled { task in
            Stage.migrationID(ofTask: task).map(migrations.contains) ?? false
        }
    }

    /// A task that does not stop although it should have long ago; nil when there is none.
    package func pretence(longestStop: Duration) -> String? { transport.pretence(longestStop: longestStop) }

    /// Takes no more tasks; `run` returns when those it has are done.
    package func drain() { transport.beginGracefulShutdown() }

    /// Takes no more tasks and stops what runs at its last checkpoint.
    package func stopNow() { transport.stopNow() }
}
