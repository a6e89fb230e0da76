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
    /// False once the task is another's, or this process ends: what it made is for the next attempt then.
    let mayAct: @Sendable (CallIdentity) -> Bool
    /// Tells the coordinator what the host is like now.
    let announce: @Sendable () async -> Void
    /// Choosing devices and defining the domain that takes them is one step: two VMs never get the same GPU.
    private let placement = Slots(1)

    init(
        configuration: WorkerConfiguration, permit: @escaping @Sendable (String, CallIdentity) async throws -> Void,
        mayAct: @escaping @Sendable (CallIdentity) -> Bool, announce: @escaping @Sendable () async -> Void
    ) {
        self.configuration = configuration
        self.permit = permit
        self.mayAct = mayAct
        self.announce = announce
    }

    func deploy(
        request: ServerRequest<DeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> {
        let call = try CallIdentity(request.metadata)
        try call.require(.deploy, ofMigration: request.message.manifest.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            if case .console(let pattern) = request.options.verification.method { try validateConsolePattern(pattern) }
            // With the digests and targets that the conversion added.
            if request.mode != .dryRun { try await configuration.record(request.manifest) }
            let result =
                switch request.mode {
                case .dryRun, .check: try await examine(request)
                case .deploy: try await deploy(request, call, writer)
                case .unspecified, .UNRECOGNIZED:
                    throw MigrationError(.invalidArgument, "deploy mode \(request.mode.rawValue) is not known")
                }
            try await writer.write(.with { $0.result = result })
            return [:]
        }
    }

    /// Answers what is or would be; changes nothing.
    private func examine(_ request: DeployRequest) async throws -> DeployResult {
        try await blocking("deploy") {
            let plan = try DeployPlan(request.manifest, request.options, configuration, mode: request.mode)
            var result = try plan.result()
            if request.mode == .dryRun {
                result.domainXml = try plan.domain.text()
            } else {
                result.domainState = try plan.deployment.state(of: plan.domain.name)
            }
            return result
        }
    }

    private func deploy(
        _ request: DeployRequest, _ call: CallIdentity, _ writer: RPCWriter<DeployUpdate>
    ) async throws -> DeployResult {
        let (plan, domain) = try await placement.with { try await define(request, call) }
        var hasRun = false
        do {
            var result = try plan.result()
            // The coordinator hears of the domain before it hears that the task is done.
            await announce()
            try await writer.step(domain.name, "defined as \(result.domainUuid)")
            try Task.checkCancellation()
            if request.options.start {
                try await start(domain, plan)
                hasRun = true
                Failpoint.deployStarted.hit()
                try await writer.step(domain.name, "domain started")
                result.proof = try await verify(domain, plan, writer)
                result.guestDevices = try await guestProof(domain, plan, writer)
                if let baseline = plan.baseline {
                    result.benchmark = try await benchmark(baseline, domain, plan, writer)
                }
            }
            let state = try await blocking("deploy") { try domain.state() }
            guard !request.options.start || state.isRunning else {
                throw MigrationError(
                    .failedPrecondition, "domain \(domain.name) was started and is \(state) now",
                    hint: "look into /var/log/libvirt/qemu/\(domain.name).log, then run the same command again")
            }
            result.domainState = "\(state)"
            try Task.checkCancellation()
            return result
        } catch {
            throw await takeBack(plan, request, call, because: error, ran: hasRun)
        }
    }

    /// One that runs is fine. Otherwise the source must not have been started since its disks were read.
    private func start(_ domain: LibvirtDomain, _ plan: DeployPlan) async throws {
        try await blockingCancellable("deploy") { [configuration] stop in
            if try !domain.state().isActive {
                let manifest = plan.domain.manifest
                if manifest.source.kind == .vsphere {
                    try configuration.requireUnchangedVM(manifest, isOff: true, stop: stop)
                }
                // libvirt takes the devices from the host's drivers now.
                try plan.requireUnused()
                try plan.requireMemory()
            }
            try domain.start()
        }
    }

    private func define(_ request: DeployRequest, _ call: CallIdentity) async throws -> (DeployPlan, LibvirtDomain) {
        @Sendable func plan() throws -> DeployPlan {
            try DeployPlan(request.manifest, request.options, configuration, mode: request.mode)
        }
        let first = try await blocking("deploy", plan)
        do { try await permit("define-domain", call) } catch {
            // An earlier attempt may have come further.
            throw await takeBack(first, request, call, because: error, ran: false)
        }
        Failpoint.deployPermitted.hit()
        return try await blocking("deploy") {
            var chosen = first
            let owner = chosen.owner(fence: call.fence)
            do { try chosen.claim(owner) } catch let error as MigrationError where error.code == .resourceExhausted {
                // Another process was faster: look again, there may be one more. Without one this says who has them.
                chosen = try plan()
                try chosen.claim(owner)
            }
            Failpoint.deployClaimed.hit()
            return (chosen, try chosen.define(owner))
        }
    }

    /// Undoes a deploy that failed or was cancelled. Returns what to say of it.
    private func takeBack(
        _ plan: DeployPlan, _ request: DeployRequest, _ call: CallIdentity, because error: any Error, ran: Bool
    ) async -> any Error {
        // What may succeed when it is tried again goes on from here, and so does the task's next owner.
        if let error = error as? MigrationError, error.code.isRetryable || error.code == .aborted { return error }
        guard mayAct(call) else { return error }
        var failure = error as? MigrationError ?? MigrationError(.cancelled, "cancelled")
        if !(error is MigrationError), !(error is CancellationError) {
            failure = MigrationError(.internal, "\(error)")
        }
        // Somebody may work with it, whatever the coordinator was told of this host's domains.
        if request.doneBefore, plan.isDefined {
            failure.message += "; domain \(plan.domain.name) was there before and stays"
            return failure
        }
        do {
            try await blocking("deploy") { try plan.rollBack(plan.owner(fence: call.fence), ran: ran) }
            failure.message += "; domain \(plan.domain.name) was undefined again, its disks stay"
        } catch {
            failure.message += "; and undefining domain \(plan.domain.name) again failed: \(error)"
        }
        await announce()
        return failure
    }

    func undeploy(
        request: ServerRequest<UndeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> {
        let call = try CallIdentity(request.metadata)
        try call.require(.undeploy, ofMigration: request.message.migrationID)
        return StreamingServerResponse { writer in
            let request = request.message
            guard isValidDomainName(request.domainName) else {
                throw MigrationError(.invalidArgument, "\"\(request.domainName)\" can't be a domain's name")
            }
            let owner = GPUOwner(
                domain: request.domainName, migration: request.migrationID, fence: call.fence,
                libvirt: configuration.libvirtURI)
            let dirty = try await placement.with {
                try await permit("undefine-domain", call)
                return try await blockingCancellable("undeploy") { stop in
                    try removeDeployment(of: owner, configuration, stop: stop, force: request.force)
                }
            }
            await announce()
            try await writer.step(request.domainName, "undefined")
            try await writer.write(
                .with {
                    $0.result.domainName = request.domainName
                    $0.result.devices = dirty.map(\.description)
                    $0.result.findings = dirty.map { function in
                        .make(
                            .note, "\(function)",
                            "\(function) was given back; it may hold what the guest left in it, and no other VM gets it "
                                + "before it was reset",
                            remedy: "flotilla gpu reset \(function), or reboot the host (not by kexec)")
                    }
                })
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
            func ask(_ command: String) throws -> String { try configuration.askGuest(domain, command) }
            _ = try waitForAgent(domain, timeout: timeout, stop: stop, ask: ask) { _ in }
            let seen = try guestDevices(
                windows: plan.domain.manifest.vm.isWindows, timeout: timeout, stop: stop, ask: ask)
            try requireVisible(plan.domain.devices.flatMap(\.self), vgpus: plan.domain.vgpus.count, in: seen)
            return seen.map(\.text)
        }
    }

    private func benchmark(
        _ baseline: GPUBaseline, _ domain: LibvirtDomain, _ plan: DeployPlan, _ writer: RPCWriter<DeployUpdate>
    ) async throws -> GpuBenchmark {
        let options = plan.domain.options
        try await writer.step(domain.name, "running benchmark \(baseline.name) in the guest")
        let seconds = options.verification.timeoutSeconds
        let result = try await blockingCancellable("verify") { stop in
            func ask(_ command: String) throws -> String { try configuration.askGuest(domain, command) }
            let timeout = Duration.seconds(seconds == 0 ? 300 : Int(seconds))
            _ = try waitForAgent(domain, timeout: timeout, stop: stop, ask: ask) { _ in }
            return try benchmarkGuest(
                baseline, tolerance: options.gpuCheck.hasTolerancePercent ? options.gpuCheck.tolerancePercent : 2,
                stop: stop, ask: ask)
        }
        try await writer.step(domain.name, result.text)
        return result
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
                try waitForAgent(
                    domain, timeout: timeout, stop: stop, ask: { try configuration.askGuest(domain, $0) },
                    progress: { _ in })
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
