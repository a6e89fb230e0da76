import Deploy
import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf

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
                let owner = plan.owner(fence: call.fence)
                // With the digests and targets that the conversion added.
                try await configuration.record(manifest)
                try await permit("define-domain", call)
                Failpoint.deployPermitted.hit()
                return try await blocking("deploy") {
                    var plan = plan
                    try plan.claim(owner)
                    Failpoint.deployClaimed.hit()
                    do {
                        let domain = try plan.deployment.define(plan.domain)
                        Failpoint.deployDefined.hit()
                        try plan.giveBackSurplus(owner)
                        return (plan, domain)
                    } catch {
                        if plan.domain.hasHostDevices { try? plan.giveBackUnused(owner) }
                        throw error
                    }
                }
            }
            var result = DeployResult()
            result.domainName = plan.domain.name
            result.domainUuid = try plan.domain.uuid()
            result.manifestSha256 = try manifestDigest(manifest)
            result.devices = plan.domain.devices.flatMap { $0.map(\.address) }
            result.findings = plan.findings
            result.vgpus = plan.records.map { record in
                .with {
                    $0.deviceID = record.device
                    $0.profile = record.profile
                    $0.function = record.function
                    $0.uuid = record.uuid ?? ""
                }
            }
            if !plan.vgpus.isEmpty { result.guestLicenseFiles = vgpuLicenseFiles(windows: manifest.vm.isWindows) }
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
                try await blocking("deploy") {
                    do { try domain.start() } catch {
                        try? plan.rollBack(plan.owner(fence: call.fence))
                        throw error
                    }
                }
                Failpoint.deployStarted.hit()
                try await writer.step(domain.name, "started")
                result.proof = try await verify(domain, plan, writer)
                result.guestDevices = try await guestProof(domain, plan, writer)
            }
            result.domainState = try await blocking("deploy") { "\(try domain.state())" }
            try await writer.write(.with { [result] in $0.result = result })
            return [:]
        }
    }

    func undeploy(
        request: ServerRequest<UndeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> {
        let call = try CallIdentity(request.metadata)
        guard !request.message.migrationID.isEmpty, call.task == "\(request.message.migrationID)-undeploy" else {
            throw MigrationError(
                .invalidArgument, "task \(call.task) is not the undeploy of migration '\(request.message.migrationID)'")
        }
        return StreamingServerResponse { writer in
            let request = request.message
            guard isValidDomainName(request.domainName) else {
                throw MigrationError(.invalidArgument, "\"\(request.domainName)\" can't be a domain's name")
            }
            try await placement.with {
                try await permit("undefine-domain", call)
                try await blocking("undeploy") {
                    try removeDeployment(
                        of: request.domainName, migration: request.migrationID, fence: call.fence, configuration)
                }
            }
            await announce()
            try await writer.write(.with { $0.result.domainName = request.domainName })
            return [:]
        }
    }

    /// What the guest sees of its devices, when that was asked for.
    private func guestProof(
        _ domain: LibvirtDomain, _ plan: DeployPlan, _ writer: RPCWriter<DeployUpdate>
    ) async throws -> [String] {
        guard plan.domain.options.gpuCheck.visible else { return [] }
        try await writer.step(domain.name, "asking the guest which devices it sees")
        let seconds = plan.domain.options.verification.timeoutSeconds
        let timeout = Duration.seconds(seconds == 0 ? 300 : Int(seconds))
        return try await blockingCancellable("verify") { stop in
            _ = try waitForAgent(domain, timeout: timeout, stop: stop, progress: { _ in })
            let seen = try guestDevices(timeout: timeout, stop: stop) { try domain.agentCommand($0, seconds: 10) }
            try requireVisible(plan.domain.devices.flatMap(\.self), vgpus: plan.domain.vgpus.count, in: seen)
            return seen.map(\.text)
        }
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
