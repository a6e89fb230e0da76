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

    init(_ text: String, _ access: VSphereAccess) throws {
        if VSphereURL.isOne(text) {
            let url = try VSphereURL(parsing: text)
            self = .vsphere(url, try access.server(of: url))
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
            do { take(try captureManifest(from: url, vmName: vmName, stop: stop), url.description) } catch let error
                as MigrationError where [.failedPrecondition, .unimplemented, .dataLoss].contains(error.code)
            {
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
                try inventory.virtualMachines(stop: stop) { take($0, url.description) }
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
                // What a manifest says is judged even where its disks lie elsewhere.
                let manifest = try ManifestFile(path: "\(folder)/\(name)").valid(name: "\(folder)/\(name)")
                take(manifest, "manifest:\(folder)/\(name)")
            }
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
