import Assessment
import Export
import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import VSphere

/// Where an assessment's VMs come from.
enum AssessSource {
    case file(SourceURL)
    /// Every manifest of a folder.
    case folder(String)
    case vsphere(VSphereURL, VIMServer)

    init(_ text: String, _ access: VSphereAccess, _ transfer: VSphereTransfer) throws {
        if VSphereURL.isOne(text) {
            var url = try VSphereURL(parsing: text)
            try transfer.apply(to: &url)
            self = .vsphere(url, try access.server(of: url, tellsRetries: true))
            return
        }
        let url = try SourceURL(parsing: text)
        self = url.kind == .manifest && Files.isDirectory(url.path) ? .folder(url.path) : .file(url)
    }

    /// Hands out each VM's manifest with the source's name, and sources that a capture refuses for what they are.
    ///
    /// - Throws: what kept a source from being read.
    func capture(
        vmName: String?, stop: StopFlag, _ take: (Manifest, String) -> Void,
        refused: (String, MigrationError) -> Void
    ) throws {
        switch self {
        case .file(let url):
            do {
                take(try captureManifest(from: url, vmName: vmName, stop: stop), url.description)
            } catch let error as MigrationError
                where error.code != .cancelled && Files.exists(url.path)
            {
                // The others are judged all the same.
                refused(url.description, error)
            }
        case .vsphere(var url, let server):
            if let vmName { url.vm = vmName }
            let client = try VIMClient(server, stop: stop)
            defer { client.close() }
            let inventory = try Inventory(client, url, stop: stop)
            if url.vm != nil {
                take(try inventory.virtualMachine(stop: stop), url.description)
            } else {
                try inventory.virtualMachines(stop: stop) {
                    url.vm = $0.source.vmMoid
                    take($0, url.description)
                }
            }
        case .folder(let folder):
            let names = try Files.list(folder).filter { name in
                [".json", ".yaml", ".yml"].contains { name.lowercased().hasSuffix($0) }
            }
            guard !names.isEmpty else {
                throw MigrationError(.notFound, "\(folder): holds no manifests", hint: "they end in .json or .yaml")
            }
            for name in names.sorted() {
                try stop.check()
                let path = "\(folder)/\(name)"
                do { take(try Self.manifest(path, stop), "manifest:\(path)") } catch let error as MigrationError
                    where error.code != .cancelled
                {
                    // The others are judged all the same.
                    refused("manifest:\(path)", error)
                }
            }
        }
    }

    /// What a manifest says is judged even where its disks lie elsewhere.
    private static func manifest(_ path: String, _ stop: StopFlag) throws -> Manifest {
        var manifest = try ManifestFile(path: path).valid(name: path)
        // HyperSDK's states no sizes of disks, only their files'.
        guard manifest.disks.contains(where: { $0.capacityBytes == 0 }) else { return manifest }
        do {
            return try captureManifest(from: SourceURL(parsing: "manifest:\(path)"), vmName: nil, stop: stop)
        } catch let error as MigrationError where error.code != .cancelled {
            for index in manifest.disks.indices where manifest.disks[index].capacityBytes == 0 {
                let disk = manifest.disks[index]
                manifest.disks[index].capacityBytes = disk.source.length
                manifest.warn(
                    disk.id, "\(disk.id): its size is not known, only that of its file: \(error.message)",
                    remedy: "assess it where its disks are")
            }
            return manifest
        }
    }
}

/// Profiles in files: what `flotilla host profile` or `host show` printed, or a `host list --json`; or a folder of such.
func hostProfiles(in path: String) throws -> [HostProfile] {
    guard Files.isDirectory(path) else { return try hostProfiles(inFile: path) }
    let names = try Files.list(path).filter { $0.hasSuffix(".json") }.sorted()
    guard !names.isEmpty else {
        throw MigrationError(
            .notFound, "\(path): holds no profiles (*.json)", hint: "flotilla host profile prints one on each host")
    }
    return try names.flatMap { try hostProfiles(inFile: "\(path)/\($0)") }
}

private func hostProfiles(inFile path: String) throws -> [HostProfile] {
    let json = try Files.read(path, limit: 64 << 20)
    // The three shapes share no field but hosts, profile and name.
    let found: [HostProfile]
    if let list = try? ListHostsResponse(jsonUTF8Bytes: json), !list.hosts.isEmpty {
        found = list.hosts.map(\.profile)
    } else if let host = try? Host(jsonUTF8Bytes: json), host.hasProfile {
        found = [host.profile]
    } else {
        do { found = [try HostProfile(jsonUTF8Bytes: json)] } catch {
            throw MigrationError(
                .invalidArgument, "\(path): is no host profile: \(error)",
                hint: "flotilla host profile prints one; flotilla host show NAME and host list --json do as well")
        }
    }
    for profile in found where profile.name.isEmpty {
        throw MigrationError(.invalidArgument, "\(path): the host has no name", hint: "write its name")
    }
    return found
}
