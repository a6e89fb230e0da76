import Convert
import Deploy
import DiskImage
import FlotillaProtocol
import HostKit
import MigrationModel
import VSphere

extension WorkerConfiguration {
    /// Records of exports that may have left something on a server.
    var exportFolder: String { "\(stateDirectory)/exports" }

    /// Captures the VM that a vsphere:// source names. Blocking.
    func capture(_ text: String, vmName: String?, stop: StopFlag) throws -> Manifest {
        var url = try VSphereURL(parsing: text)
        if let vmName { url.vm = vmName }
        guard url.vm != nil else {
            throw MigrationError(
                .invalidArgument, "\(url) holds many VMs and none is named", hint: "name it: --vm NAME, or ?vm=NAME")
        }
        let client = try VIMClient(vsphere.source(of: url, host: host).server, stop: stop)
        defer { client.close() }
        return try Inventory(client, url, stop: stop).virtualMachine(stop: stop)
    }

    /// Begins the export of a captured VM, which is compared with its capture. Blocking.
    func openExport(_ manifest: Manifest, task: String, stop: StopFlag) throws -> VMExport {
        let server = try vsphere.source(of: VSphereURL(parsing: manifest.source.url), host: host).server
        return try VMExport(server, manifest, folder: exportFolder, task: task, stop: stop)
    }

    /// Throws `failedPrecondition` when a VM whose disks were converted before is no longer what was captured. Blocking.
    func requireUnchangedVM(_ manifest: Manifest, stop: StopFlag) throws {
        let url = try VSphereURL(parsing: manifest.source.url)
        let client = try VIMClient(vsphere.source(of: url, host: host).server, stop: stop)
        defer { client.close() }
        try requireUnchanged(client, url, manifest, stop: stop)
    }

    /// Takes away what exports of earlier processes left on servers. Blocking.
    func sweepExports(_ records: [String], stop: StopFlag) -> [MigrationError] {
        VSphere.sweepExports(records, servers: vsphere.servers, stop: stop)
    }
}

extension DiskConversion {
    /// The conversion of a disk while it comes from a server.
    init(
        _ disk: Disk, of export: VMExport, _ manifest: Manifest, _ configuration: WorkerConfiguration,
        format: TargetFormat, work: String, pool: String, domain: String
    ) throws {
        guard isDiskID(disk.id) else { throw MigrationError(.invalidArgument, "\"\(disk.id)\" is not a disk id") }
        let url = try VSphereURL(parsing: manifest.source.url)
        let source = try configuration.vsphere.source(of: url, host: configuration.host)
        let limits = configuration.vsphere.limits(source, manifest, disk)
        var options = Options()
        options.rateLimit = configuration.rateLimit
        let origin: Source =
            switch url.transfer {
            case .nfc:
                .stream(
                    Stream(name: disk.source.path) { stop in
                        PacedSource(try export.stream(of: disk, stop: stop), limits, stop)
                    })
            case .datastore: .disk(name: disk.source.path) { try export.ranges(of: disk, stop: $0) }
            }
        self.init(
            origin,
            to: .file(format, path: targetPath(pool: pool, domain: domain, disk: disk.id, format: format.rawValue)),
            workDirectory: work, name: disk.id, options: options)
    }
}

/// How often a disk that broke off on its way is fetched again, and when. Only that disk: the others stay.
struct TransferRetries {
    private var failures = 0
    private var damages = 0

    /// Seconds to wait; nil to give up.
    mutating func pause(after error: MigrationError, isRanges: Bool) -> Int? {
        switch error.code {
        case .unavailable: break
        // The session of a datastore's address ended; the next address is of a new one.
        case .unauthenticated where isRanges: break
        // Cut off in a way that looked like the end, or damaged on its way.
        case .dataLoss:
            damages += 1
            if damages > 2 { return nil }
        default: return nil
        }
        failures += 1
        return failures <= 5 ? 1 << (failures - 1) : nil
    }
}
