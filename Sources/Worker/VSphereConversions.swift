import Convert
import Deploy
import DiskImage
import FlotillaProtocol
import HostKit
import Logging
import MigrationModel
import VSphere

extension WorkerConfiguration {
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
    ///
    /// - Parameter isOff: whether it must not run, however its disks were read.
    func requireUnchangedVM(_ manifest: Manifest, isOff: Bool = false, stop: StopFlag) throws {
        let url = try VSphereURL(parsing: manifest.source.url)
        let client = try VIMClient(vsphere.source(of: url, host: host).server, stop: stop)
        defer { client.close() }
        try requireUnchanged(client, url, manifest, isOff: isOff, stop: stop)
    }

    /// Takes away what exports that are over left on servers, again and again: a server may be away, a snapshot appear
    /// late, its removal last. What stands in the way is said once.
    func keepSweepingExports(_ logger: Logger) async throws {
        var said: Set<String> = []
        while true {
            let failures = try await blockingCancellable("exports") { stop in
                do {
                    return sweepExports(try leftExports(in: exportFolder), servers: vsphere.servers, stop: stop)
                } catch let error as MigrationError { return [error] }
            }.map { "\($0)" }
            for failure in failures where !said.contains(failure) { logger.warning("\(failure)") }
            said = Set(failures)
            try await Task.sleep(for: exportSweepInterval)
        }
    }
}

extension DiskWork {
    /// Of a disk that comes from a server.
    init(
        _ disk: Disk, of export: VMExport, _ manifest: Manifest, _ configuration: WorkerConfiguration,
        _ place: DiskPlace
    ) throws {
        let url = try VSphereURL(parsing: manifest.source.url)
        let source = try configuration.vsphere.source(of: url, host: configuration.host)
        let limits = configuration.vsphere.limits(source, manifest, disk)
        var options = DiskConversion.Options()
        let name = disk.source.path
        switch (url.transfer, url.isStaged) {
        case (.datastore, _):
            options.rateLimit = configuration.rateLimit
            let origin = DiskConversion.Source.disk(name: name) { stop in
                PacedDisk(try export.ranges(of: disk, stop: stop), limits, stop)
            }
            try self.init(disk, origin, place, options)
        case (.nfc, false):
            options.rateLimit = configuration.rateLimit
            let stream = DiskConversion.Stream(name: name) { stop in
                PacedSource(try export.stream(of: disk, stop: stop), limits, stop)
            }
            try self.init(disk, .stream(stream), place, options)
        case (.nfc, true):
            // The file's way into the image burdens the source no more.
            let all = limits + [configuration.rateLimit].compactMap { $0 }
            let staging = Staging(disk, work: place.work, keptAs: place.path(of: disk, "vmdk")) { stop in
                PacedSource(try export.stream(of: disk, stop: stop), all, stop)
            }
            try self.init(disk, .disk(name: name) { try staging.open($0) }, place, options, staging: staging)
        }
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
