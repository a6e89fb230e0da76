import Convert
import Deploy
import DiskImage
import Export
import FlotillaProtocol
import FoundationEssentials
import Glibc
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf

/// The three stages as gRPC services: ordinary handlers that know nothing of queues. Each reads its request, works
/// through the stage's own module on a blocking thread, and streams progress and at last a result.
///
/// What every handler keeps to: it may be run again after a crash at any point, with a larger fence; it stops soon
/// after its Swift task is cancelled; it asks for a permit right before what can't be taken back.
struct ExportHandler: ExportService.ServiceProtocol {
    let configuration: WorkerConfiguration

    func export(
        request: ServerRequest<ExportRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ExportUpdate> {
        try CallIdentity(request.metadata).require(.export, ofMigration: request.message.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            let source = try SourceURL(parsing: request.sourceURL)
            try configuration.requireSource(source.path)
            let vmName = request.vmName.isEmpty ? nil : request.vmName
            var manifest = try await blockingCancellable("export") { stop in
                try captureManifest(
                    from: source, vmName: vmName, stop: stop, allow: configuration.requireSource)
            }
            manifest.migrationID = request.migrationID
            manifest.capturedAt = Moment.now.timestamp
            manifest.createdBy = "flotilla \(version)"
            try await configuration.record(manifest)
            Failpoint.exportManifestWritten.hit()
            try await writer.write(
                .with {
                    $0.step = .with { [manifest] in
                        $0.subject = manifest.vm.name
                        $0.message = manifest.summary
                    }
                })
            try await writer.write(.with { [manifest] in $0.result = .with { $0.manifest = manifest } })
            return [:]
        }
    }
}

struct ConvertHandler: ConvertService.ServiceProtocol {
    let configuration: WorkerConfiguration
    let permit: @Sendable (String, CallIdentity) async throws -> Void

    func convert(
        request: ServerRequest<ConvertRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ConvertUpdate> {
        let call = try CallIdentity(request.metadata)
        try call.require(.convert, ofMigration: request.message.manifest.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            let pool = try configuration.pool(named: request.pool)
            guard isValidDomainName(request.domainName) else {
                throw MigrationError(.invalidArgument, "\"\(request.domainName)\" can't be a domain's name")
            }
            guard let format = TargetFormat(rawValue: request.format) else {
                throw MigrationError(.invalidArgument, "target format \"\(request.format)\" is neither qcow2 nor raw")
            }
            for disk in request.manifest.disks { try configuration.requireSource(disk.source.path) }
            try await blocking("convert") { try requireUnchanged(request.manifest) }

            if let kept = try await blocking("convert", { try keptDisks(request, pool, format) }) {
                try await writer.write(.with { $0.result = .with { $0.disks = kept } })
                return [:]
            }

            let work = WorkDirectory(pool: pool.path, task: call.task)
            let folder = try await blocking("convert") { try work.adopt(fence: call.fence) }
            let conversions = try request.manifest.disks.map {
                try DiskConversion(
                    $0, format: format, work: folder, pool: pool.path, domain: request.domainName,
                    rateLimit: configuration.rateLimit)
            }
            do {
                // All disks are complete and verified before the first gets its final name.
                var notices: [DiskConversion.Notice] = []
                for (disk, conversion) in zip(request.manifest.disks, conversions) {
                    do {
                        notices.append(try await run(conversion, writer))
                    } catch var error as MigrationError {
                        error.message = "\(disk.text): \(error.message)"
                        throw error
                    }
                }
                try await permit("publish-disks", call)
                var disks = request.manifest.disks
                for (index, conversion) in conversions.enumerated() {
                    let notice = notices[index]
                    let result = try await blocking("publish") { try conversion.publish(notice) }
                    disks[index].take(result)
                    let text = "written to \(result.path)"
                    try await writer.write(
                        .with {
                            $0.step = .with {
                                $0.subject = conversion.name
                                $0.message = text
                            }
                        })
                }
                try await writer.write(.with { [disks] in $0.result = .with { $0.disks = disks } })
            } catch let error as MigrationError where !error.keepsCheckpoint {
                // Nothing of this attempt can be of use to another.
                // What can't be tidied up now is the next attempt's; the person must hear of the cause.
                try? await blocking("convert") {
                    for conversion in conversions { try conversion.withdraw() }
                    try work.remove()
                }
                throw error
            }
            return [:]
        }
    }

    private func run(
        _ conversion: DiskConversion, _ writer: RPCWriter<ConvertUpdate>
    ) async throws -> DiskConversion.Notice {
        let (reports, continuation) = AsyncStream<DiskConversion.Progress>.makeStream(
            bufferingPolicy: .bufferingNewest(1))
        let notice = try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                for await report in reports {
                    try await writer.write(
                        .with {
                            $0.progress = .with {
                                $0.subject = conversion.name
                                $0.phase = "converting"
                                $0.bytesDone = report.doneBytes
                                $0.bytesTotal = report.capacity
                                $0.bytesWritten = report.writtenBytes
                            }
                        })
                }
            }
            defer { continuation.finish() }
            return try await blockingCancellable("convert") { stop in
                try conversion.convert(stop: stop) { continuation.yield($0) }
            }
        }
        if let text = notice.text {
            try await writer.write(
                .with {
                    $0.step = .with {
                        $0.subject = conversion.name
                        $0.message = text
                    }
                })
        }
        return notice
    }
}

struct DeployHandler: DeployService.ServiceProtocol {
    let configuration: WorkerConfiguration
    let permit: @Sendable (String, CallIdentity) async throws -> Void
    /// Tells the coordinator what the host is like now.
    let announce: @Sendable () async -> Void
    /// Choosing devices and defining the domain that takes them is one step: two VMs never get the same GPU.
    private let placement = Slots(1)

    init(
        configuration: WorkerConfiguration, permit: @escaping @Sendable (String, CallIdentity) async throws -> Void,
        announce: @escaping @Sendable () async -> Void
    ) {
        self.configuration = configuration
        self.permit = permit
        self.announce = announce
    }

    func deploy(
        request: ServerRequest<DeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> {
        let call = try CallIdentity(request.metadata)
        try call.require(.deploy, ofMigration: request.message.manifest.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            let (manifest, options) = (request.manifest, request.options)
            if case .console(let pattern) = options.verification.method { try validateConsolePattern(pattern) }
            let (plan, defined) = try await placement.with {
                let plan = try await blocking("deploy") {
                    try DeployPlan(manifest, options, configuration, mode: request.mode)
                }
                guard request.mode == .deploy else { return (plan, LibvirtDomain?.none) }
                // With the digests and targets that the conversion added.
                try await configuration.record(manifest)
                try await permit("define-domain", call)
                Failpoint.deployPermitted.hit()
                let domain = try await blocking("deploy") { try plan.deployment.define(plan.domain) }
                Failpoint.deployDefined.hit()
                return (plan, domain)
            }
            var result = DeployResult()
            result.domainName = plan.domain.name
            result.domainUuid = try plan.domain.uuid()
            result.manifestSha256 = try manifestDigest(manifest)
            result.devices = plan.domain.devices.flatMap { $0.map(\.address) }
            result.findings = plan.findings
            guard let domain = defined else {
                switch request.mode {
                case .dryRun: result.domainXml = try plan.domain.text()
                case .check:
                    result.domainState = try await blocking("deploy") {
                        try plan.deployment.state(of: plan.domain.name)
                    }
                case .deploy, .unspecified, .UNRECOGNIZED:
                    throw MigrationError(.invalidArgument, "deploy mode \(request.mode.rawValue) is not known")
                }
                try await writer.write(.with { [result] in $0.result = result })
                return [:]
            }
            // The coordinator hears of the domain before it hears that the task is done.
            await announce()
            try await writer.step(domain.name, "defined as \(result.domainUuid)")
            if options.start {
                try await blocking("deploy") { try domain.start() }
                Failpoint.deployStarted.hit()
                try await writer.step(domain.name, "started")
                result.proof = try await verify(domain, plan, writer)
            }
            result.domainState = try await blocking("deploy") { "\(try domain.state())" }
            try await writer.write(.with { [result] in $0.result = result })
            return [:]
        }
    }

    func undeploy(
        request: ServerRequest<UndeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> {
        throw MigrationError(.unimplemented, "DeployService/Undeploy is not in this version")
    }

    /// Waits for the proof that was asked for, and returns it.
    private func verify(
        _ domain: LibvirtDomain, _ plan: DeployPlan, _ writer: RPCWriter<DeployUpdate>
    ) async throws -> String {
        let verification = plan.domain.options.verification
        guard let method = verification.method else { return "" }
        let timeout = Duration.seconds(verification.timeoutSeconds == 0 ? 300 : Int(verification.timeoutSeconds))
        try await writer.step(domain.name, method.waitingText)
        return try await blockingCancellable("verify") { stop in
            switch method {
            case .console(let pattern):
                try waitForConsole(
                    logPath: plan.consoleLog, pattern: pattern, timeout: timeout, stop: stop,
                    domainState: domain.state, progress: { _ in })
            case .agent:
                try waitForAgent(domain, timeout: timeout, stop: stop, progress: { _ in })
            }
        }
    }
}

extension Verification.OneOf_Method {
    fileprivate var waitingText: String {
        switch self {
        case .console(let pattern): "waiting for a console line that matches \(pattern)"
        case .agent: "waiting for the guest agent"
        }
    }
}

extension RPCWriter<DeployUpdate> {
    fileprivate func step(_ subject: String, _ message: String) async throws {
        try await write(
            .with {
                $0.step = .with {
                    $0.subject = subject
                    $0.message = message
                }
            })
    }
}

extension CallIdentity {
    /// Throws unless the call is the stage's task of this migration: ids become file names.
    fileprivate func require(_ stage: Stage, ofMigration id: String) throws {
        guard task == stage.taskID(ofMigration: id) else {
            throw MigrationError(.invalidArgument, "task \(task) is not the \(stage.rawValue) of migration '\(id)'")
        }
    }
}
