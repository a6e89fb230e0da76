import ArgumentParser
import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import SwiftProtobuf
import Synchronization
import Worker

/// One host's worker. `usage` also tells how many tasks its handlers ran.
struct WorkerProcess: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "worker")
    @OptionGroup var place: Place
    @Option(help: "Handlers that run at once.") var slots = 2

    func run() async throws {
        let bus = try place.bus(user: NoOp.host)
        let logger = place.logger("worker")
        let journal = try Journal(
            path: "\(place.dir)/worker.journal", answers: { _ in false }, logger: logger, cleanUp: { _, _ in })
        let transport = BusServerTransport(
            bus: bus, names: Names(), member: try place.member(NoOp.host), settings: .init(slots: slots),
            ledger: journal, logger: logger)
        let noOp = NoOp()
        let server = GRPCServer(
            transport: transport, services: [NoOpExport(noOp: noOp), NoOpConvert(noOp: noOp), NoOpDeploy(noOp: noOp)],
            interceptors: [ErrorInterceptor()])
        try await transport.publishInventory(NoOp.profile)
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await server.serve() }
            group.addTask { try await obey { _ in try usage(noOp.count) } }
            defer { group.cancelAll() }
            try await group.next()
        }
    }
}

/// What the handlers did, and the migration they agree to have done.
final class NoOp: Sendable {
    static let host = "kvm1"
    private let ran = Atomic<Int>(0)

    var count: Int { ran.load(ordering: .relaxed) }
    func run() { ran.add(1, ordering: .relaxed) }

    static func migration(_ name: String) -> SubmitMigrationRequest {
        .with {
            $0.sourceURL = "ova:/\(name).ova"
            $0.host = host
            $0.pool = "default"
            $0.format = "qcow2"
        }
    }

    static func manifest(_ request: ExportRequest) -> Manifest {
        .with {
            $0.schemaVersion = 1
            $0.source.fingerprint = request.sourceURL
            $0.vm.name = request.migrationID
            $0.vm.memory.bytes = 1 << 30
            $0.vm.cpu.count = 1
            $0.disks = [
                .with {
                    $0.id = "disk0"
                    $0.capacityBytes = 1 << 20
                }
            ]
        }
    }

    static var profile: HostProfile {
        .with {
            $0.name = host
            $0.capturedAt = Moment.now.timestamp
            $0.domainType = "kvm"
            $0.memoryBytes = 64 << 30
            $0.cpus = 32
            $0.pools = [
                .with {
                    $0.name = "default"
                    $0.path = "/pool"
                    $0.freeBytes = 1 << 40
                    $0.writable = true
                }
            ]
        }
    }
}

private struct NoOpExport: ExportService.SimpleServiceProtocol {
    let noOp: NoOp

    func export(
        request: ExportRequest, response: RPCWriter<ExportUpdate>, context: ServerContext
    ) async throws {
        noOp.run()
        // A task on its own has no migration.
        guard !request.migrationID.isEmpty else { return }
        try await response.write(.with { $0.result.manifest = NoOp.manifest(request) })
    }
}

private struct NoOpConvert: ConvertService.SimpleServiceProtocol {
    let noOp: NoOp

    func convert(
        request: ConvertRequest, response: RPCWriter<ConvertUpdate>, context: ServerContext
    ) async throws {
        noOp.run()
        var disks = request.manifest.disks
        for index in disks.indices { disks[index].target.path = "/pool/\(request.domainName).qcow2" }
        try await response.write(.with { [disks] in $0.result.disks = disks })
    }
}

private struct NoOpDeploy: DeployService.SimpleServiceProtocol {
    let noOp: NoOp

    func deploy(
        request: DeployRequest, response: RPCWriter<DeployUpdate>, context: ServerContext
    ) async throws {
        noOp.run()
        try await response.write(
            .with {
                $0.result.domainName = request.options.domainName
                $0.result.domainState = "running"
            })
    }

    func undeploy(
        request: UndeployRequest, response: RPCWriter<DeployUpdate>, context: ServerContext
    ) async throws { noOp.run() }
}
