import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

/// What a deploy will define, decided before anything changes. Looks at the host as it is now, not as it was when the
/// migration was placed. Blocking.
struct DeployPlan: Sendable {
    let domain: DomainXML
    let deployment: Deployment
    let findings: [Finding]
    /// Where the serial console is recorded when it is needed as proof.
    let consoleLog: String

    init(
        _ manifest: Manifest, _ options: DeployOptions, _ configuration: WorkerConfiguration, mode: DeployMode
    ) throws {
        try Self.requireDisksInPools(manifest, configuration, mustExist: mode != .dryRun)
        let connection = try LibvirtConnection(uri: configuration.libvirtURI)
        let host = try hostProfile(name: configuration.host, connection: connection, pools: configuration.pools)
        var domain = DomainXML(manifest: manifest, options: options, host: host)
        let match = deviceMatch(manifest: manifest, options: options, host: host)
        guard match.isComplete else {
            throw MigrationError(
                .failedPrecondition, match.findings.map(\.message).joined(separator: "; "),
                hint: match.findings.first?.remedy)
        }
        domain.devices = match.devices
        domain.tpmEmulator = tpmEmulatorInstalled()
        if mode != .dryRun { domain.bufferedDisks = disksWithoutDirectIO(manifest) }
        findings = placementFindings(domain)
        consoleLog = "\(configuration.stateDirectory)/console/\(manifest.migrationID).log"
        if case .console = options.verification.method {
            domain.consoleLog = consoleLog
            if mode == .deploy { try Files.createDirectories(Files.parent(of: consoleLog)) }
        }
        self.domain = domain
        deployment = Deployment(connection: connection, migrationID: manifest.migrationID)
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
