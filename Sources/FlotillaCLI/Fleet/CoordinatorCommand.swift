import ArgumentParser
import Coordinator
import GRPCCore
import GRPCNIOTransportHTTP2Posix
import Glibc
import HostKit
import Logging
import Messaging
import MessagingAMQP
import MigrationModel

struct CoordinatorCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "coordinator",
        abstract: "Decides which host does what, and keeps the fleet's records.",
        discussion: """
            Runs until SIGTERM. Nothing is lost when it is killed: its database is what counts, and the next process \
            goes on from there. While the broker can't be reached it waits, and logs what is in the way. Hosts are those whose keys it has: a new one joins with `flotilla host enroll`.
            """)

    @Option(help: ArgumentHelp("The coordinator's configuration.", valueName: "file"), completion: .file())
    var config: String

    @Flag(name: .shortAndLong, help: "Log more.")
    var verbose = false

    func run() async throws {
        let configuration = try CoordinatorConfiguration(path: config)
        try configuration.broker.requireFiles()
        let logger = serviceLogger("coordinator", verbose: verbose)
        let member = try configuration.member()
        let lock = try lockStateFolder(
            configuration.stateDirectory, role: "coordinator.lock",
            hint: "stop that one, or give this one a state folder of its own")
        defer { withExtendedLifetime(lock) {} }
        let bus = try AMQPBus(configuration.broker, onChange: ConnectionLog(logger).note)
        var settings = Coordinator.Settings(names: configuration.names, policy: configuration.policy)
        settings.requesters = Set(configuration.requesters)
        settings.acceptanceTimeout = configuration.policy.leaseDuration * 2
        let coordinator = Coordinator(
            store: try SQLiteStore(path: "\(configuration.stateDirectory)/coordinator.sqlite"), bus: bus,
            member: member, settings: settings, logger: logger)
        let socket = try FleetSocket(path: configuration.socket)
        let server = GRPCServer(
            transport: .http2NIOPosix(address: .unixDomainSocket(path: socket.path), transportSecurity: .plaintext),
            services: [CoordinatorAPI(coordinator)], interceptors: [ErrorInterceptor()])
        logger.info("coordinator starts", metadata: ["api": "\(socket.path)", "version": "\(version)"])
        let signals = Signals(SIGTERM, SIGINT)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                try await coordinator.run { try member.believed().filter { $0 != FleetMember.coordinator } }
            }
            group.addTask { try await server.serve() }
            group.addTask {
                try await watchLiveness(
                    of: bus, lease: configuration.policy.leaseDuration,
                    publishTimeout: configuration.broker.publishTimeout, logger)
            }
            group.addTask { try await watchConsumers(of: bus, every: configuration.broker.heartbeat * 30, logger) }
            group.addTask {
                await signals.first()
                try Task.checkCancellation()
                endUnlessServing(bus, logger)
            }
            defer { group.cancelAll() }
            try await group.next()
            server.beginGracefulShutdown()
        }
        await bus.close()
        logger.info("coordinator ended")
    }
}
