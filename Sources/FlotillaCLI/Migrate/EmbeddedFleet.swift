import Convert
import Coordinator
import Deploy
import FlotillaProtocol
import GRPCCore
import GRPCInProcessTransport
import Glibc
import HostKit
import Logging
import Messaging
import MigrationModel
import Worker

/// Coordinator and worker of one machine in this process, over the in-process bus: the same state machine, task
/// transport and store as a fleet has.
///
/// The state folder belongs to one process at a time. Holding its lock proves that whoever had tasks before is gone,
/// so they are taken back at once instead of when their leases run out.
struct EmbeddedFleet {
    typealias Client = CoordinatorService.Client<InProcessTransport.Client>

    let libvirtURI: String
    let pool: String
    let stateDirectory: String
    let logger: Logger
    /// Exports and conversions that run at once, and as many deploys beside them.
    var slots = 2
    /// Of all conversions together.
    var rateLimit: RateLimit?
    var vsphere: [VSphereSource] = []
    var recoversDevices = true

    /// Runs the fleet around `body`, which talks to it through the coordinator's API and returns, with its value, the
    /// migrations it saw to their ends. `interrupted` returns when the work is to stop early.
    func run<Value: Sendable>(
        interrupted: @escaping @Sendable () async -> Void,
        _ body: @escaping @Sendable (Client) async throws -> (Value, migrations: Set<String>)
    ) async throws -> Value {
        let lock = try lockStateFolder(
            stateDirectory, role: "lock", hint: "wait for it to end, or name another folder with --state")
        defer { withExtendedLifetime(lock) {} }
        let bus = InProcessBus()
        let names = Names()
        let members = FleetMember.pair(host: libvirtURI)
        let coordinator = Coordinator(
            store: try SQLiteStore(path: "\(stateDirectory)/flotilla.sqlite"), bus: bus,
            member: members.coordinator, settings: .init(names: names, startsOnlySubmitted: true), logger: logger)
        try await bus.declare(names.topology(hosts: [libvirtURI]))
        var configuration = WorkerConfiguration(
            host: libvirtURI, libvirtURI: libvirtURI, pools: [PoolFolder(name: pool, path: pool)],
            // The sources are named by the person at this command line, with that person's rights.
            sourceFolders: ["/"], stateDirectory: stateDirectory, names: names,
            transport: .init(slots: slots))
        configuration.rateLimit = rateLimit
        // The host's worker may use the same folder, and exports of its own.
        configuration.exportFolder = "\(stateDirectory)/exports-migrate"
        configuration.vsphere = VSphereSources(vsphere)
        configuration.recoversDevices = recoversDevices
        let worker = try Worker(configuration, bus: bus, member: members.worker, logger: logger)

        let transport = InProcessTransport()
        let server = GRPCServer(
            transport: transport.server, services: [CoordinatorAPI(coordinator)], interceptors: [ErrorInterceptor()])
        let client = GRPCClient(transport: transport.client)

        return try await withThrowingTaskGroup(of: Value?.self) { group in
            group.addTask {
                try await coordinator.run { [libvirtURI] }
                return nil
            }
            group.addTask {
                try await worker.run()
                return nil
            }
            group.addTask {
                try await server.serve()
                return nil
            }
            group.addTask {
                try await client.runConnections()
                return nil
            }
            group.addTask {
                await interrupted()
                try Task.checkCancellation()
                worker.stopNow()
                throw MigrationError(.cancelled, "interrupted", hint: "run the same command again to continue")
            }
            group.addTask {
                let (value, migrations) = try await body(Client(wrapping: client))
                // Results are confirmed and work folders gone before the process is.
                await worker.settle(migrations)
                try Task.checkCancellation()
                return value
            }
            defer {
                worker.stopNow()
                group.cancelAll()
            }
            while let ended = try await group.next() {
                if let value = ended { return value }
            }
            throw MigrationError(.internal, "the embedded fleet ended on its own")
        }
    }
}
