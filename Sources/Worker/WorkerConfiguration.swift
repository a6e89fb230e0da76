package import Convert
package import Deploy
import FlotillaProtocol
import HostKit
package import Messaging
import MigrationModel
package import Passthrough
import SwiftProtobuf

/// What a worker is told about itself and its host. Nothing in a message can widen it.
package struct WorkerConfiguration: Sendable {
    /// Names the queues.
    package var host: String
    package var libvirtURI: String
    package var pools: [PoolFolder]
    /// Folders that file sources may lie in; a task that names another is refused.
    package var sourceFolders: [String]
    /// Absolute; holds the journal, manifests and console logs.
    package var stateDirectory: String
    package var names: Names
    package var transport: BusServerTransport.Settings
    /// Records of exports that may have left something on a server: of this process and those before it.
    package var exportFolder: String
    /// How often what such exports left is looked for.
    package var exportSweepInterval = Duration.seconds(180)
    /// How often the coordinator is told what the host is like.
    package var inventoryInterval = Duration.seconds(60)
    package var devices = DeviceHost()
    /// Whether what processes that are gone left of devices is put right at the start.
    package var recoversDevices = true
    /// Sends a command to the QEMU agent in a domain's guest and returns its answer.
    package var askGuest: @Sendable (LibvirtDomain, String) throws -> String = { try $0.agentCommand($1, seconds: 10) }
    /// Shared by all conversions of this worker: together they read no faster.
    package var rateLimit: RateLimit?
    /// vCenter and ESXi servers whose VMs it may move.
    package var vsphere = VSphereSources([])

    package init(
        host: String, libvirtURI: String, pools: [PoolFolder], sourceFolders: [String], stateDirectory: String,
        names: Names = Names(), transport: BusServerTransport.Settings = .init()
    ) {
        self.host = host
        self.libvirtURI = libvirtURI
        self.pools = pools
        self.sourceFolders = sourceFolders
        self.stateDirectory = stateDirectory
        exportFolder = "\(stateDirectory)/exports"
        self.names = names
        self.transport = transport
    }

    /// One journal per host and set of pools: a worker only ever speaks for work whose folders it can reach.
    var journalPath: String {
        let parts = [host] + pools.flatMap { [$0.name, $0.path] }
        let mark = hex(Digest.hash(.sha256, Array(parts.joined(separator: "\0").utf8)).prefix(4))
        return "\(stateDirectory)/worker-\(mark).journal"
    }

    /// Writes the manifest for people and for the record; stages get theirs in their requests.
    func record(_ manifest: Manifest) async throws {
        let folder = "\(stateDirectory)/manifests"
        let json = try manifest.jsonUTF8Bytes() as [UInt8]
        try await blocking("manifest") {
            try Files.createDirectories(folder)
            try Files.writeAtomically(json, to: "\(folder)/\(manifest.migrationID).json", mode: 0o644)
        }
    }

    func pool(named name: String) throws -> PoolFolder {
        guard let pool = pools.first(where: { $0.name == name }) else {
            throw MigrationError(
                .failedPrecondition, "host \(host) has no pool \(name)",
                hint: "its pools are \(pools.map(\.name).joined(separator: ", "))")
        }
        return pool
    }

    /// Throws `permissionDenied` unless `path`, with its links resolved, lies in one of the source folders. Blocking.
    ///
    /// - Returns: the path without links, by which the file is to be opened: others may change the links.
    @discardableResult
    func requireSource(_ path: String) throws -> String {
        let resolved = try Files.canonical(path)
        func holds(_ folder: String) -> Bool {
            folder == "/" || !folder.isEmpty && resolved.hasPrefix(folder + "/")
        }
        // What has its name as a prefix is in a folder without links. The others are looked at only for what is in
        // none: one that is away keeps nobody, and holds nothing.
        let isAllowed =
            sourceFolders.contains(where: holds)
            || sourceFolders.contains { (try? Files.canonical($0)).map(holds) ?? false }
        guard isAllowed else {
            throw MigrationError(
                .permissionDenied, "source \(path) lies in none of host \(host)'s source folders",
                hint: "add its folder to the worker's configuration")
        }
        return resolved
    }
}
