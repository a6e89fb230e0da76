import Export
package import FlotillaProtocol
package import HostKit
import MigrationModel

/// Reads a server's inventory, or one data centre of it: two passes of the property collector, one for what VMs refer to
/// and one for the VMs, which are handed out one by one. Memory grows with hosts and folders, not with VMs. Blocking.
package struct Inventory: Sendable {
    private let client: VIMClient
    /// What is captured when a running VM may be moved as a snapshot finds it.
    private let source: VSphereURL
    private let container: ObjectReference
    package private(set) var infrastructure: Infrastructure
    private var parents: [ObjectReference: (name: String, parent: ObjectReference?)] = [:]
    private var indices = Indices()

    private struct Indices {
        var hosts: [String: Int] = [:]
        var datastores: [String: Int] = [:]
        var networks: [String: Int] = [:]
        var portgroups: [String: Int] = [:]
    }

    /// Reads everything but the VMs.
    ///
    /// - Throws: `notFound` for a data centre that isn't there, naming those that are.
    package init(_ client: VIMClient, _ source: VSphereURL, stop: StopFlag) throws {
        self.client = client
        self.source = source
        infrastructure = Infrastructure(about: client.content.about)
        let root = client.content.rootFolder
        var found: [ObjectContent] = []
        var names: [ObjectReference: (name: String, parent: ObjectReference?)] = [:]
        if source.datacenter != nil {
            let specs = [PropertySpec("Datacenter", ["name", "parent"]), PropertySpec("Folder", ["name", "parent"])]
            try client.retrieve(specs, below: root, pageSize: 1000, stop: stop) {
                names[$0.object] = ($0.text("name").map(unescapedName) ?? "", $0.reference("parent"))
            }
            container = try Self.datacenter(source, names, root)
        } else {
            container = root
        }
        parents = names
        let specs = [
            PropertySpec("Datacenter", ["name", "parent"]), PropertySpec("Folder", ["name", "parent"]),
            PropertySpec("ComputeResource", ["name", "parent"]),
            PropertySpec("ClusterComputeResource", ["name", "parent"]),
            PropertySpec("HostSystem", Infrastructure.Host.paths),
            PropertySpec(
                "Datastore",
                [
                    "name", "parent", "summary.type", "summary.capacity", "summary.freeSpace",
                    "summary.accessible",
                ]),
            PropertySpec("Network", ["name", "parent"]),
            PropertySpec("DistributedVirtualPortgroup", ["name", "parent", "key"]),
        ]
        try client.retrieve(specs, below: container, pageSize: 100, stop: stop) { content in
            parents[content.object] = (content.text("name").map(unescapedName) ?? "", content.reference("parent"))
            // Their functions are many and their memory is needed later: only what they say about devices is kept.
            if content.object.type == "HostSystem" {
                infrastructure.hosts.append(Infrastructure.Host(content, datacenter: "", cluster: ""))
                infrastructure.hosts[infrastructure.hosts.count - 1].name =
                    content.text("name").map(unescapedName) ?? ""
            } else if !["Folder", "ComputeResource"].contains(content.object.type) {
                found.append(content)
            }
        }
        place(found)
    }

    private static func datacenter(
        _ source: VSphereURL, _ names: [ObjectReference: (name: String, parent: ObjectReference?)],
        _ root: ObjectReference
    ) throws -> ObjectReference {
        let wanted = source.datacenter ?? ""
        let all = names.keys.filter { $0.type == "Datacenter" }
        let paths = all.map { (object: $0, path: path(of: $0, names, until: { $0 == root })) }
        let matches = paths.filter { $0.path == wanted || (!wanted.contains("/") && names[$0.object]?.name == wanted) }
        guard let match = matches.first, matches.count == 1 else {
            let list = paths.map(\.path).sorted().prefix(16).map(\.printable).joined(separator: ", ")
            throw MigrationError(
                matches.isEmpty ? .notFound : .invalidArgument,
                "\(source.authority): \(matches.isEmpty ? "no" : "more than one") data centre \(wanted.printable)",
                hint: list.isEmpty ? "the account sees none" : "there are: \(list)")
        }
        return match.object
    }

    private static func path(
        of object: ObjectReference, _ names: [ObjectReference: (name: String, parent: ObjectReference?)],
        until isEnd: (ObjectReference) -> Bool
    ) -> String {
        var parts: [String] = []
        var current: ObjectReference? = object
        // The tree comes from the server: it may be no tree.
        while let object = current, !isEnd(object), let entry = names[object], parts.count < 64 {
            parts.insert(entry.name, at: 0)
            current = entry.parent
        }
        return parts.joined(separator: "/")
    }

    /// The nearest ancestor of one of the types.
    private func ancestor(of object: ObjectReference?, _ types: Set<String>) -> ObjectReference? {
        var current = object
        for _ in 0..<64 {
            guard let object = current else { return nil }
            if types.contains(object.type) { return object }
            current = parents[object]?.parent
        }
        return nil
    }

    private func datacenterName(_ object: ObjectReference?) -> String {
        ancestor(of: object, ["Datacenter"]).flatMap { parents[$0]?.name } ?? ""
    }

    private mutating func place(_ found: [ObjectContent]) {
        let root = client.content.rootFolder
        for (object, entry) in parents where object.type == "Datacenter" {
            if container.type == "Datacenter" && object != container { continue }
            infrastructure.datacenters.append(
                .init(
                    id: object.value, name: entry.name, path: Self.path(of: object, parents, until: { $0 == root })))
        }
        infrastructure.datacenters.sort { $0.path < $1.path }
        for content in found {
            let name = content.text("name").map(unescapedName) ?? ""
            let datacenter = datacenterName(content.object)
            switch content.object.type {
            case "ClusterComputeResource":
                infrastructure.clusters.append(.init(id: content.object.value, name: name, datacenter: datacenter))
            case "Datastore":
                infrastructure.datastores.append(
                    .init(
                        id: content.object.value, name: name, datacenter: datacenter,
                        kind: content.text("summary.type") ?? "",
                        capacityBytes: UInt64(clamping: content.number("summary.capacity") ?? 0),
                        freeBytes: UInt64(clamping: content.number("summary.freeSpace") ?? 0),
                        isAccessible: content.flag("summary.accessible") ?? false))
            case "Datacenter": break
            default:
                infrastructure.networks.append(
                    .init(
                        id: content.object.value, name: name, datacenter: datacenter, key: content.text("key")))
            }
        }
        infrastructure.clusters.sort { ($0.name, $0.id) < ($1.name, $1.id) }
        infrastructure.datastores.sort { ($0.name, $0.id) < ($1.name, $1.id) }
        infrastructure.networks.sort { ($0.name, $0.id) < ($1.name, $1.id) }
        for index in infrastructure.hosts.indices {
            let host = ObjectReference("HostSystem", infrastructure.hosts[index].id)
            infrastructure.hosts[index].datacenter = datacenterName(host)
            infrastructure.hosts[index].cluster =
                ancestor(of: host, ["ClusterComputeResource"]).flatMap { parents[$0]?.name } ?? ""
        }
        infrastructure.hosts.sort { ($0.name, $0.id) < ($1.name, $1.id) }
        for (index, host) in infrastructure.hosts.enumerated() { indices.hosts[host.id] = index }
        for (index, datastore) in infrastructure.datastores.enumerated() { indices.datastores[datastore.id] = index }
        for (index, network) in infrastructure.networks.enumerated() {
            indices.networks[network.id] = index
            if let key = network.key { indices.portgroups[key] = index }
        }
    }

    /// Every VM as a manifest, in the server's order.
    package func virtualMachines(stop: StopFlag, _ take: (Manifest) throws -> Void) throws {
        let tags = try tags(stop: stop)
        try client.retrieve(
            [PropertySpec("VirtualMachine", VMCapture.paths)], below: container, pageSize: 250, stop: stop
        ) { content in
            var capture = VMCapture(content, self, source, tags)
            try take(capture.run())
        }
    }

    /// Of one VM, or of all. Tags decide nothing: where they can't be read, the manifests say so.
    private func tags(of object: ObjectReference? = nil, stop: StopFlag) throws -> VMTags {
        // A host alone has none.
        guard client.content.about.type == "VirtualCenter" else { return .known([:]) }
        do {
            let session = try TagSession(client.server, version: client.content.about.version, stop: stop)
            defer { session.close() }
            guard let object else { return .known(try session.all()) }
            return .known([object.value: try session.ofMachine(object.value)])
        } catch let error as MigrationError where error.code != .cancelled {
            return .unknown(error)
        }
    }

    /// The VM that the source names.
    ///
    /// - Throws: `notFound`, or `invalidArgument` when several have the name.
    package func virtualMachine(stop: StopFlag) throws -> Manifest {
        let wanted = source.vm ?? ""
        var named: [ObjectReference] = []
        var exact: ObjectReference?
        var names: [String] = []
        try client.retrieve(
            [PropertySpec("VirtualMachine", ["name"])], below: container, pageSize: 2000, stop: stop
        ) { content in
            let name = content.text("name").map(unescapedName) ?? ""
            if name == wanted { named.append(content.object) }
            names.append(name)
            if content.object.value == wanted { exact = content.object }
        }
        if let exact, named.isEmpty { named = [exact] }
        guard let object = named.first, named.count == 1 else {
            let near = nearest(to: wanted, among: names).map { "'\($0.printable)'" }.joined(separator: ", ")
            throw MigrationError(
                named.isEmpty ? .notFound : .invalidArgument,
                "\(source.authority): \(named.isEmpty ? "no VM is" : "\(named.count) VMs are") called "
                    + wanted.printable,
                hint: named.isEmpty
                    ? "flotilla inventory lists those the account sees\(near.isEmpty ? "" : ", among them \(near)"); "
                        + "upper and lower case differ"
                    : "name one by its id: \(named.map(\.value).sorted().joined(separator: ", "))")
        }
        return try capture(object, tags(of: object, stop: stop), stop: stop)
    }

    func capture(_ object: ObjectReference, _ tags: VMTags = .known([:]), stop: StopFlag) throws -> Manifest {
        let content = try client.properties(VMCapture.paths, of: object, stop: stop)
        var capture = VMCapture(content, self, source, tags)
        return try capture.run()
    }

    func host(_ id: String?) -> Infrastructure.Host? {
        id.flatMap { indices.hosts[$0] }.map { infrastructure.hosts[$0] }
    }

    func datastore(_ id: String?) -> Infrastructure.Datastore? {
        id.flatMap { indices.datastores[$0] }.map { infrastructure.datastores[$0] }
    }

    func network(_ id: String?) -> Infrastructure.Network? {
        id.flatMap { indices.networks[$0] }.map { infrastructure.networks[$0] }
    }

    func portgroup(_ key: String) -> Infrastructure.Network? {
        indices.portgroups[key].map { infrastructure.networks[$0] }
    }

    func datacenter(of object: ObjectReference?) -> String {
        let found = ancestor(of: object, ["Datacenter"]) ?? (container.type == "Datacenter" ? container : nil)
        let root = client.content.rootFolder
        return found.map { Self.path(of: $0, parents, until: { $0 == root }) } ?? ""
    }

    /// Folders between the data centre's own and the VM.
    func folder(of object: ObjectReference?) -> String {
        guard let object, object.type == "Folder" else { return "" }
        let parts = Self.path(of: object, parents, until: { $0.type != "Folder" }).split(separator: "/")
        return parts.dropFirst().joined(separator: "/")
    }
}

/// Names of inventory objects have '%', '/' and '\' escaped as %25, %2f and %5c.
func unescapedName(_ name: String) -> String {
    guard name.contains("%") else { return name }
    var result = ""
    var rest = name[...]
    while let character = rest.popFirst() {
        guard character == "%" else {
            result.append(character)
            continue
        }
        switch rest.prefix(2).lowercased() {
        case "25": result.append("%")
        case "2f": result.append("/")
        case "5c": result.append("\\")
        default:
            result.append("%")
            continue
        }
        rest = rest.dropFirst(2)
    }
    return result
}
