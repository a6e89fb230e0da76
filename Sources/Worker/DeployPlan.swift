import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf

/// What a deploy will define, decided before anything changes. Looks at the host as it is now, not as it was when the
/// migration was placed. Blocking.
struct DeployPlan: Sendable {
    var domain: DomainXML
    let deployment: Deployment
    let findings: [Finding]
    /// Where the serial console is recorded when it is needed as proof.
    let consoleLog: String
    /// vGPUs to make for it; the domain has them once they are claimed.
    let vgpus: [AssignedDevice]
    var records: [VgpuRecord] = []
    /// Of what was claimed: what no domain had before.
    var untouched: [GPUResource] = []
    /// The host's, as they were when the plan was made.
    let functions: [PciFunction]
    /// The migration's domain was there before.
    let isDefined: Bool
    let host: DeviceHost
    /// What the started guest's GPU is compared with.
    let baseline: GPUBaseline?

    init(
        _ manifest: Manifest, _ options: DeployOptions, _ configuration: WorkerConfiguration, mode: DeployMode
    ) throws {
        try Self.requireDisksInPools(manifest, configuration, mustExist: mode != .dryRun)
        let connection = try LibvirtConnection(uri: configuration.libvirtURI)
        let host = try hostProfile(
            name: configuration.host, connection: connection, pools: configuration.pools, devices: configuration.devices
        )
        var domain = DomainXML(manifest: manifest, options: options, host: host)
        let match = deviceMatch(manifest: manifest, options: options, host: host)
        guard match.isComplete else {
            throw MigrationError(
                .failedPrecondition, match.findings.map(\.message).joined(separator: "; "),
                hint: match.findings.first?.remedy)
        }
        baseline = try Self.baseline(options.gpuCheck, of: match, configuration)
        domain.devices = match.devices
        vgpus = match.vgpus
        functions = host.pciFunctions
        isDefined = host.domains.contains { $0.name == domain.name }
        self.host = configuration.devices
        domain.tpmEmulator = tpmEmulatorInstalled()
        if mode != .dryRun { domain.bufferedDisks = disksWithoutDirectIO(manifest) }
        findings = placementFindings(domain) + vgpuFindings(vgpus, windows: manifest.vm.isWindows)
        consoleLog = "\(configuration.stateDirectory)/console/\(manifest.migrationID).log"
        if case .console = options.verification.method {
            domain.consoleLog = consoleLog
            if mode == .deploy { try Files.createDirectories(Files.parent(of: consoleLog)) }
        }
        self.domain = domain
        deployment = Deployment(connection: connection, migrationID: manifest.migrationID)
    }

    /// What the deploy is known to give, as far as it has come.
    func result() throws -> DeployResult {
        var result = DeployResult()
        result.domainName = domain.name
        result.domainUuid = try domain.uuid()
        result.manifestSha256 = try manifestDigest(domain.manifest)
        result.devices = domain.devices.flatMap { $0.map(\.address) }
        result.findings = findings
        result.vgpus = records.map { record in
            .with {
                $0.deviceID = record.device
                $0.profile = record.profile
                $0.function = record.function
                $0.uuid = record.uuid ?? ""
            }
        }
        result.guestLicenseFiles = vgpuLicenseFiles(vgpus, windows: domain.manifest.vm.isWindows)
        return result
    }

    private static func baseline(
        _ check: GpuCheck, of match: DeviceMatch, _ configuration: WorkerConfiguration
    ) throws -> GPUBaseline? {
        guard !check.benchmark.isEmpty else { return nil }
        guard check.tolerancePercent.isFinite, check.tolerancePercent >= 0 else {
            throw MigrationError(.invalidArgument, "a tolerance of \(check.tolerancePercent) % is none")
        }
        let baseline = try GPUBaselines(folder: configuration.devices.folder).read(check.benchmark)
        let ids = match.devices.joined().map(\.id.text)
        guard let gpu = baseline.gpu, !ids.contains(gpu), match.vgpus.isEmpty else { return baseline }
        throw MigrationError(
            .failedPrecondition,
            "baseline \(baseline.name) is of a GPU \(gpu), the VM gets \(ids.isEmpty ? "none" : ids.joined(separator: ", "))",
            hint: "record one of that GPU on host \(configuration.host)")
    }

    /// A disk path in a message opens nothing but a file that lies directly in a pool.
    private static func requireDisksInPools(
        _ manifest: Manifest, _ configuration: WorkerConfiguration, mustExist: Bool
    ) throws {
        for disk in manifest.disks {
            let path = disk.target.path
            guard configuration.pools.contains(where: { $0.path == Files.parent(of: path) }) else {
                throw MigrationError(
                    .permissionDenied, "\(disk.id): \(path) lies in no pool of host \(configuration.host)")
            }
            guard !mustExist || Files.isRegular(path) else {
                throw MigrationError(
                    .notFound, "\(disk.id): \(path) is gone or is not a plain file",
                    hint: "restore it; or undefine the domain, remove what is left of its disks and the state folder "
                        + "to migrate from the source again")
            }
        }
    }
}
