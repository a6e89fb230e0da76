import ArgumentParser
import Coordinator
import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import GRPCInProcessTransport
import HostKit
import Logging
import Messaging
import MessagingAMQP
import MigrationModel
import SwiftProtobuf
import Synchronization

/// `tasks COUNT BYTES CHUNK` stores tasks that wait, CHUNK of them in a transaction; `migrations COUNT` asks the API for
/// whole migrations; `times PATH` writes when each task was published; `usage` tells CPU and memory.
struct CoordinatorProcess: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "coordinator")
    @OptionGroup var place: Place
    @Flag(help: "Note when each task is published.") var times = false

    func run() async throws {
        let member = try place.member(FleetMember.coordinator)
        let bus = TimedBus(try place.bus(user: FleetMember.coordinator), isTiming: times)
        // Done when this process answers, so that workers find their queues.
        try await bus.declare(Names().topology(hosts: try member.believed()))
        let store = try SQLiteStore(path: "\(place.dir)/coordinator.sqlite")
        let coordinator = Coordinator(
            store: store, bus: bus, member: member, logger: place.logger(FleetMember.coordinator))
        let transport = InProcessTransport()
        let server = GRPCServer(
            transport: transport.server, services: [CoordinatorAPI(coordinator)], interceptors: [ErrorInterceptor()])
        let client = GRPCClient(transport: transport.client)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await coordinator.run { try member.believed() } }
            group.addTask { try await server.serve() }
            group.addTask { try await client.runConnections() }
            group.addTask {
                try await obey { words in
                    switch words.first {
                    case "tasks":
                        guard words.count == 4, let count = Int(words[1]), let bytes = Int(words[2]),
                            let chunk = Int(words[3])
                        else { throw ValidationError("tasks COUNT BYTES CHUNK") }
                        let start = Moment.now
                        try await Self.add(count, bytes: bytes, chunk: chunk, to: store)
                        return "{\"start\": \(start.milliseconds)}"
                    case "migrations":
                        guard words.count == 3, let count = Int(words[1]) else {
                            throw ValidationError("migrations COUNT NAME")
                        }
                        let start = Moment.now
                        let service = CoordinatorService.Client(wrapping: client)
                        let batches = stride(from: 0, to: count, by: 500).map { $0..<min($0 + 500, count) }
                        for batch in batches {
                            let request = SubmitMigrationsRequest.with {
                                $0.migrations = batch.map { NoOp.migration("\(words[2])-\($0)") }
                            }
                            _ = try await service.submitMigrations(request)
                        }
                        return "{\"start\": \(start.milliseconds)}"
                    case "times":
                        try Files.writeAtomically(Array(bus.lines.utf8), to: words[1])
                        return "{}"
                    default: return try usage()
                    }
                }
            }
            defer { group.cancelAll() }
            try await group.next()
        }
    }

    /// Tasks as migrations have them, whose migrations have ended: nothing follows from their ends.
    private static func add(_ count: Int, bytes: Int, chunk: Int, to store: SQLiteStore) async throws {
        let request: [UInt8] = try ExportRequest.with { $0.sourceURL = String(repeating: "x", count: bytes) }
            .serializedBytes()
        for first in stride(from: 0, to: count, by: chunk) {
            try await store.write { store in
                let now = Moment.now
                for _ in first..<min(first + chunk, count) {
                    let id = makeMigrationID(at: now)
                    try store.save(
                        MigrationRecord(
                            id: id, key: id, request: SubmitMigrationRequest(), state: .done, createdAt: now,
                            updatedAt: now))
                    try store.save(
                        TaskRecord(migrationID: id, stage: .export, host: NoOp.host, request: request, now: now))
                }
            }
        }
    }
}

/// Notes when tasks are handed to the bus.
private final class TimedBus: MessageBus {
    private let bus: AMQPBus
    private let isTiming: Bool
    private let published = Mutex<[(task: String, at: Moment)]>([])

    init(_ bus: AMQPBus, isTiming: Bool) {
        self.bus = bus
        self.isTiming = isTiming
    }

    var lines: String { published.withLock { $0.map { "\($0.task) \($0.at.milliseconds)\n" }.joined() } }

    var isDurable: Bool { bus.isDurable }
    var status: BusStatus { bus.status }
    func declare(_ topology: Topology) async throws { try await bus.declare(topology) }
    func publish(_ message: Messaging.Message) async throws {
        if isTiming, !message.correlationID.isEmpty {
            published.withLock { $0.append((message.correlationID, .now)) }
        }
        try await bus.publish(message)
    }
    func subscribe(_ queue: String, prefetch: Int) async throws -> Subscription {
        try await bus.subscribe(queue, prefetch: prefetch)
    }
    func depths(of queues: [String]) async throws -> [String: QueueDepth] { try await bus.depths(of: queues) }
    func look(
        through queue: String, limit: Int, _ body: @escaping @Sendable (Messaging.Message) async throws -> Verdict
    ) async throws { try await bus.look(through: queue, limit: limit, body) }
}
