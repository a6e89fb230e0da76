import FlotillaProtocol
import HostKit
import MigrationModel

/// A disk image with its parents, child first.
struct VMDKChain {
    struct Link {
        let region: Region
        let summary: VMDKSummary
    }

    /// VMware stops at 32 snapshots; vSphere adds deltas of its own for a moment.
    static let depthLimit = 64

    let links: [Link]

    static let remedy =
        "put all of the VM's files into one folder: clone the VM or its disk on the source (vmkfstools -i), or export an OVA"

    /// - Parameter owner: who names the file, for messages.
    init(_ name: String, in folder: SourceFolder, owner: String) throws {
        var links: [Link] = []
        var next = name
        var by = owner
        while true {
            let region = try folder.file(next, owner: by, remedy: Self.remedy)
            guard !links.contains(where: { $0.region.path == region.path }) else {
                throw MigrationError(.invalidArgument, "\(owner): the chain of \(name.printable) leads back to \(next)")
            }
            guard links.count < Self.depthLimit else {
                throw MigrationError(
                    .invalidArgument, "\(owner): the chain of \(name.printable) is deeper than \(Self.depthLimit)",
                    hint: "consolidate the VM's disks on the source")
            }
            let summary = try VMDKSummary(region, owner: region.path)
            links.append(Link(region: region, summary: summary))
            guard summary.isDelta else { break }
            guard !summary.parentFile.isEmpty else {
                throw MigrationError(
                    .invalidArgument, "\(region.path): is a snapshot of a disk it doesn't name",
                    hint: "consolidate the VM's disks on the source")
            }
            next = summary.parentFile
            by = region.path
        }
        self.links = links
    }

    /// Every file that holds a part of the disk: descriptors and their extents, in order.
    func files(in folder: SourceFolder) throws -> [String] {
        try links.flatMap { link in
            [link.region.path]
                + (try link.summary.extents.filter { $0.kind != "ZERO" && !$0.isDevice }.map {
                    try folder.file($0.file, owner: link.region.path, remedy: Self.remedy).path
                })
        }
    }
}

extension VMDKSummary.Extent {
    /// A raw device rather than a file with the disk's bytes.
    var isDevice: Bool { kind == "VMFSRDM" || kind == "VMFSRAW" }
}
