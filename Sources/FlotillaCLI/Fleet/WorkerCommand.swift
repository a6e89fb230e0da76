import ArgumentParser
import Glibc
import HostKit
import Logging
import Messaging
import MessagingAMQP
import MigrationModel
import Worker

struct WorkerCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "worker", abstract: "One KVM host's part of the fleet.",
        subcommands: [WorkerRunCommand.self, WorkerEnrollCommand.self], defaultSubcommand: WorkerRunCommand.self)
}

struct WorkerRunCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "run",
        abstract: "Serves the tasks of one KVM host from the fleet's message broker.",
        discussion: """
            SIGTERM drains: no task is taken any more, and the process ends when those it has are done, or after the \
            configured time at their last checkpoint; the next process goes on from there. A second signal ends it at \
            once. While the broker can't be reached it waits, and logs what is in the way.
            """)

    @Option(help: ArgumentHelp("The worker's configuration.", valueName: "file"), completion: .file())
    var config: String

    @Flag(name: .shortAndLong, help: "Log more.")
    var verbose = false

    func run() async throws {
        let file = try WorkerFile(path: config)
        try file.broker.requireFiles()
        let logger = serviceLogger("worker", verbose: verbose)
        let member = try file.keys.member(named: file.host)
        let lock = try lockStateFolder(
            file.worker.stateDirectory, role: "worker.lock",
            hint: "stop that one, or give this one a state folder of its own")
        defer { withExtendedLifetime(lock) {} }
        let bus = try AMQPBus(file.broker, onChange: ConnectionLog(logger).note)
        let worker = try Worker(file.worker, bus: bus, member: member, logger: logger)
        logger.info("worker starts", metadata: ["host": "\(file.host)", "version": "\(version)"])
        let signals = Signals(SIGTERM, SIGINT)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await worker.run() }
            group.addTask {
                try await watchLiveness(
                    of: bus, lease: file.worker.transport.leaseDuration, publishTimeout: file.broker.publishTimeout,
                    logger
                ) { worker.pretence(longestStop: .seconds(900)) }
            }
            group.addTask { try await watchConsumers(of: bus, every: file.broker.heartbeat * 30, logger) }
            group.addTask {
                await signals.first()
                try Task.checkCancellation()
                endUnlessServing(bus, logger)
                logger.info("worker drains", metadata: ["for at most": "\(file.drain)"])
                worker.drain()
                try await Task.sleep(for: file.drain)
                logger.warning("worker stops its tasks at their last checkpoint")
                worker.stopNow()
                // Stopping takes less than a second; whoever doesn't obey is left to the supervisor.
                try await Task.sleep(for: .seconds(30))
            }
            defer { group.cancelAll() }
            try await group.next()
        }
        await bus.close()
        logger.info("worker ended")
    }
}
