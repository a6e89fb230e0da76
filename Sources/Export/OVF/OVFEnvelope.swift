import MigrationModel

/// The parts of an OVF envelope that stand outside a virtual system.
struct OVFEnvelope {
    struct File {
        let id: String
        let name: String
        let region: Region
    }

    struct Disk {
        let id: String
        let capacity: UInt64
        /// Nil for a disk that starts empty.
        let file: File?
        /// Of the VMDK, where the format's URI says it.
        let variant: String
        let line: Int
    }

    private static let itemLimit = 4096

    let root: XMLElement
    let name: String
    private(set) var files: [String: File] = [:]
    private(set) var disks: [String: Disk] = [:]
    /// Disk ids in the order of the document.
    private(set) var diskOrder: [String] = []
    private(set) var networks: Set<String> = []
    /// The deployment option to take, or nil when there are none.
    let configuration: String?

    init(_ package: OVFPackage) throws {
        name = package.folder != nil ? package.path : "\(package.path): \(package.descriptorName)"
        root = try XMLDocument.parse(package.descriptor, name: name)
        guard root.name == "Envelope", OVFNames.envelope.contains(root.namespace) else {
            throw MigrationError(
                .invalidArgument,
                "\(name): is not an OVF 1.x or 2.x envelope: its root is \(root.name.printable) in the namespace "
                    + "'\(root.namespace.printable)'")
        }
        let options = root.ovf("DeploymentOptionSection")?.ovfAll("Configuration") ?? []
        configuration =
            (options.first { $0.ovfAttribute("default")?.asFlag == true } ?? options.first)?.ovfAttribute("id")
        for network in root.ovf("NetworkSection")?.ovfAll("Network") ?? [] {
            if let name = network.ovfAttribute("name") { networks.insert(name) }
        }
        try readReferences(package)
        try readDisks()
    }

    private mutating func readReferences(_ package: OVFPackage) throws {
        for element in (root.ovf("References")?.ovfAll("File") ?? []) {
            let owner = "\(name): line \(element.line)"
            guard let id = element.ovfAttribute("id"), let href = element.ovfAttribute("href") else {
                throw MigrationError(.invalidArgument, "\(owner): a File needs an id and a href")
            }
            if let compression = element.ovfAttribute("compression"), compression != "identity", !compression.isEmpty {
                throw MigrationError(
                    .unimplemented, "\(owner): \(href.printable) is compressed with \(compression.printable)",
                    hint: "decompress it (gunzip), and remove ovf:compression from the OVF and the .mf file")
            }
            if let chunk = element.ovfAttribute("chunkSize"), chunk != "0", !chunk.isEmpty {
                throw MigrationError(
                    .unimplemented, "\(owner): \(href.printable) is split into chunks of \(chunk.printable) bytes",
                    hint: "join the chunks (cat name.0* > name), and remove ovf:chunkSize from the OVF")
            }
            let (file, region) = try package.reference(href, owner: owner)
            if let size = element.ovfAttribute("size"), !size.isEmpty {
                guard let stated = UInt64(size) else {
                    throw MigrationError(.invalidArgument, "\(owner): size '\(size.printable)' is not a number")
                }
                guard stated == region.length else {
                    throw MigrationError(
                        .dataLoss,
                        "\(owner): \(file.printable) has \(region.length) bytes, the OVF says \(stated)",
                        hint: "copy or export the VM again")
                }
            }
            guard files.updateValue(File(id: id, name: file, region: region), forKey: id) == nil else {
                throw MigrationError(.invalidArgument, "\(owner): two files have the id \(id.printable)")
            }
            try limit(files.count)
        }
    }

    private mutating func readDisks() throws {
        for element in (root.ovf("DiskSection")?.ovfAll("Disk") ?? []) {
            guard let id = element.ovfAttribute("diskId"), !id.isEmpty else {
                throw MigrationError(.invalidArgument, "\(name): line \(element.line): a Disk needs a diskId")
            }
            let owner = "\(name): disk \(id.printable)"
            guard let text = element.ovfAttribute("capacity"), let count = UInt64(text) else {
                let text = element.ovfAttribute("capacity") ?? ""
                throw MigrationError(
                    .invalidArgument, "\(owner): capacity '\(text.printable)' is not a number of units",
                    hint: text.hasPrefix("${") ? "write the property's value into the OVF" : nil)
            }
            let unit = try AllocationUnits.bytes(
                element.ovfAttribute("capacityAllocationUnits") ?? "byte", owner: owner)
            let capacity = try checkedBytes(count, times: unit, "\(owner): capacity")
            if let parent = element.ovfAttribute("parentRef"), !parent.isEmpty {
                throw MigrationError(
                    .unimplemented, "\(owner): is a delta of the disk \(parent.printable)",
                    hint: "consolidate the VM's disks on the source and export it again")
            }
            var file: File?
            if let reference = element.ovfAttribute("fileRef"), !reference.isEmpty {
                guard let known = files[reference] else {
                    throw MigrationError(
                        .invalidArgument, "\(owner): names the file \(reference.printable), which References lacks")
                }
                file = known
            }
            let variant = try Self.variant(element.ovfAttribute("format") ?? "", owner: owner)
            let disk = Disk(id: id, capacity: capacity, file: file, variant: variant, line: element.line)
            guard disks.updateValue(disk, forKey: id) == nil else {
                throw MigrationError(.invalidArgument, "\(name): two disks have the id \(id.printable)")
            }
            diskOrder.append(id)
            try limit(diskOrder.count)
        }
    }

    /// The virtual system to capture: the only one, or the one named.
    func system(named wanted: String?) throws -> XMLElement {
        var systems: [XMLElement] = []
        collect(root, into: &systems)
        guard !systems.isEmpty else {
            throw MigrationError(.invalidArgument, "\(name): describes no virtual system")
        }
        let names = systems.map { Self.systemName($0).printable }.joined(separator: ", ")
        guard let wanted else {
            guard systems.count == 1 else {
                throw MigrationError(
                    .invalidArgument, "\(name): describes \(systems.count) VMs: \(names)",
                    hint: "choose one with --vm NAME")
            }
            return systems[0]
        }
        let matching = systems.filter { Self.systemName($0) == wanted || $0.ovfAttribute("id") == wanted }
        guard matching.count == 1 else {
            throw MigrationError(
                matching.isEmpty ? .notFound : .invalidArgument,
                "\(name): \(matching.isEmpty ? "has no VM" : "has several VMs") named \(wanted.printable); "
                    + "there are: \(names)", hint: "choose one of them with --vm NAME, by its name or its id")
        }
        return matching[0]
    }

    static func systemName(_ system: XMLElement) -> String {
        let name = system.ovf("Name")?.text.trimmed ?? ""
        if !name.isEmpty { return name }
        let hardware = system.ovf("VirtualHardwareSection")?.ovf("System")
        let identifier = hardware?.child("VirtualSystemIdentifier", OVFNames.system)?.text.trimmed ?? ""
        return identifier.isEmpty ? system.ovfAttribute("id") ?? "" : identifier
    }

    /// Collections may hold collections; the document's depth is bounded.
    private func collect(_ element: XMLElement, into systems: inout [XMLElement]) {
        for child in element.children where OVFNames.envelope.contains(child.namespace) {
            if child.name == "VirtualSystem" { systems.append(child) }
            if child.name == "VirtualSystemCollection" { collect(child, into: &systems) }
        }
    }

    private static func variant(_ format: String, owner: String) throws -> String {
        let lower = format.lowercased()
        if lower.isEmpty || lower.contains("vmdk") {
            switch lower.split(separator: "#").dropFirst().first {
            case "streamoptimized": return "streamOptimized"
            case "sparse": return "monolithicSparse"
            case "flat": return "monolithicFlat"
            default: return ""
            }
        }
        throw MigrationError(
            .unimplemented, "\(owner): has the format '\(format.printable)', not VMDK",
            hint: "convert it to VMDK with qemu-img convert -O vmdk, or export the VM again")
    }

    private func limit(_ count: Int) throws {
        guard count <= Self.itemLimit else {
            throw MigrationError(.invalidArgument, "\(name): has more than \(Self.itemLimit) files or disks")
        }
    }
}
