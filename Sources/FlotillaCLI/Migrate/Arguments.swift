import ArgumentParser
import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf

enum DiskImageFormat: String, ExpressibleByArgument, CaseIterable {
    case qcow2, raw
}

enum GPUPolicyArgument: String, ExpressibleByArgument, CaseIterable {
    case require, drop

    var policy: GpuPolicy {
        switch self {
        case .require: .gpuRequire
        case .drop: .gpuDrop
        }
    }
}

enum DiskBusArgument: String, ExpressibleByArgument, CaseIterable {
    case virtio, scsi, sata

    var bus: DiskBus {
        switch self {
        case .virtio: .virtio
        case .scsi: .scsi
        case .sata: .sataBus
        }
    }
}

/// "VM Network=bridge:br0". The source's name may hold '=' itself.
struct NetworkArgument: ExpressibleByArgument {
    let mapping: NetworkMapping

    init?(argument: String) {
        guard let equals = argument.lastIndex(of: "="), equals != argument.startIndex else { return nil }
        let target = argument[argument.index(after: equals)...].split(separator: ":", maxSplits: 1)
        guard target.count == 2, !target[1].isEmpty else { return nil }
        var mapping = NetworkMapping()
        mapping.source = String(argument[..<equals])
        switch target[0] {
        case "bridge": mapping.bridge = String(target[1])
        case "network": mapping.network = String(target[1])
        default: return nil
        }
        self.mapping = mapping
    }
}

/// "10de:20f1=grid_a100-40c": a device's vendor and device id, or a vGPU profile, and what it becomes.
struct GPUMapArgument: ExpressibleByArgument {
    let mapping: GpuMapping

    init?(argument: String) {
        let sides = argument.split(separator: "=", omittingEmptySubsequences: false)
        guard sides.count == 2, let source = GpuKind(parsing: String(sides[0])),
            let target = GpuKind(parsing: String(sides[1]))
        else { return nil }
        mapping = .with { ($0.source, $0.target) = (source, target) }
    }
}

enum VerifyArgument: ExpressibleByArgument, Equatable {
    case none
    case agent
    case console(String)

    init?(argument: String) {
        switch argument {
        case "none": self = .none
        case "agent": self = .agent
        case _ where argument.hasPrefix("console="):
            let pattern = String(argument.dropFirst("console=".count))
            guard (try? validateConsolePattern(pattern)) != nil else { return nil }
            self = .console(pattern)
        default: return nil
        }
    }

    var defaultValueDescription: String { "none" }

    var verification: Verification {
        var verification = Verification()
        switch self {
        case .none: break
        case .agent: verification.agent = true
        case .console(let pattern): verification.console = pattern
        }
        return verification
    }
}

/// "6h", "90m", "45s" or "2d" from now, or a moment as of RFC 3339.
struct DeadlineArgument: ExpressibleByArgument {
    let moment: Moment

    init?(argument: String) {
        let seconds: [Character: Int64] = ["s": 1, "m": 60, "h": 3600, "d": 24 * 3600]
        if let unit = argument.last.flatMap({ seconds[$0] }), let count = Int64(argument.dropLast()) {
            guard count > 0, count < 1 << 20 else { return nil }
            moment = .now + .seconds(count * unit)
        } else if let time = try? Google_Protobuf_Timestamp(jsonString: "\"\(argument)\""), time.moment > .now {
            moment = time.moment
        } else {
            return nil
        }
    }
}

/// What becomes of the devices that a source's VM has of its host.
struct DeviceOptions: ParsableArguments {
    @Option(help: "GPUs and other passthrough devices: require (all or nothing) or drop.")
    var gpu: GPUPolicyArgument = .require

    @Option(
        name: .customLong("gpu-map"),
        help: ArgumentHelp(
            "What a source's GPU becomes: VENDOR:DEVICE or a vGPU profile on either side. Repeatable (default: the same).",
            valueName: "source=target"))
    var gpuMap: [GPUMapArgument] = []

    func apply(to options: inout DeployOptions) {
        options.gpu = gpu.policy
        options.gpuMappings = gpuMap.map(\.mapping)
    }
}

/// What is asked of a migration, wherever it runs.
struct MigrationOptions: ParsableArguments {
    @Option(help: "Format of the disks: qcow2 or raw.")
    var format: DiskImageFormat = .qcow2

    @Option(
        name: .customLong("network"),
        help: ArgumentHelp(
            "Where a source network's NICs go: SRC=bridge:BR or SRC=network:NET. Repeatable.", valueName: "mapping"))
    var networks: [NetworkArgument] = []

    @OptionGroup var devices: DeviceOptions

    @Flag(help: "Back the guests' memory with the host's huge pages.")
    var hugepages = false

    @Flag(help: "Show the guests no option ROM of their devices.")
    var hideROM = false

    @Flag(help: "Ask the started guest's agent whether it sees its devices.")
    var verifyGPU = false

    @Option(
        help: ArgumentHelp(
            "Have the started guest run the benchmark of a baseline of the host (flotilla gpu baseline).",
            valueName: "baseline"))
    var gpuBenchmark: String?

    @Option(
        help: ArgumentHelp("By how much the guest's figure may be worse (default: 2).", valueName: "percent"))
    var gpuTolerance: Double?

    @Option(help: "Bus of the disks: virtio, scsi or sata (default: what suits the guest).")
    var diskBus: DiskBusArgument?

    @Flag(help: "Let libvirt's domain have a new UUID instead of the source's.")
    var newUUID = false

    @Flag(help: "Start the VMs.")
    var start = false

    @Option(help: ArgumentHelp("Proof that a started VM runs: console=REGEX, agent or none.", valueName: "check"))
    var verify: VerifyArgument = .none

    @Option(help: ArgumentHelp("Seconds to wait for that proof.", valueName: "seconds"))
    var verifyTimeout: UInt32 = 300

    @Option(
        help: ArgumentHelp(
            "When it must have ended, such as 6h, 90m or 2026-05-01T04:00:00Z: what is under way then is stopped.",
            valueName: "time"))
    var deadline: DeadlineArgument?

    @Flag(help: "Change nothing; say what would be done, with the domain's XML.")
    var dryRun = false

    func validate() throws {
        if verifyGPU && !start { throw ValidationError("--verify-gpu needs --start") }
        if let gpuBenchmark {
            try GPUBaseline.validate(name: gpuBenchmark)
            if !start { throw ValidationError("--gpu-benchmark needs --start") }
        }
        if let gpuTolerance {
            guard gpuBenchmark != nil else { throw ValidationError("--gpu-tolerance needs --gpu-benchmark") }
            guard (0...1000).contains(gpuTolerance) else {
                throw ValidationError("--gpu-tolerance is 0 to 1000 percent")
            }
        }
        if verify != .none && !start {
            throw ValidationError("--verify needs --start: there is nothing to watch otherwise")
        }
    }

    func apply(to request: inout SubmitMigrationRequest) {
        request.format = format.rawValue
        request.dryRun = dryRun
        if let deadline { request.deadline = deadline.moment.timestamp }
        request.options.networks = networks.map(\.mapping)
        devices.apply(to: &request.options)
        request.options.hugepages = hugepages
        request.options.hideRom = hideROM
        if verifyGPU { request.options.gpuCheck.visible = true }
        if let gpuBenchmark { request.options.gpuCheck.benchmark = gpuBenchmark }
        if let gpuTolerance { request.options.gpuCheck.tolerancePercent = gpuTolerance }
        request.options.diskBus = diskBus?.bus ?? .unspecified
        request.options.keepUuid = !newUUID
        request.options.start = start
        request.options.verification = verify.verification
        request.options.verification.timeoutSeconds = verifyTimeout
    }
}
