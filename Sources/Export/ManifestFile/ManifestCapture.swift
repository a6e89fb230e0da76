import FlotillaProtocol
import HostKit
import MigrationModel

/// Turns a manifest file into a source: its disks are found, their sizes read and compared with what it says.
struct ManifestCapture {
    /// Absolute.
    let path: String
    /// Throws for an absolute path that must not be read.
    let allow: (String) throws -> Void
    private let folder: SourceFolder

    private static let remedy = "keep the disks in the manifest's folder, or name them by an absolute path"

    init(path: String, allow: @escaping (String) throws -> Void) {
        self.path = path
        self.allow = allow
        folder = SourceFolder(path: Files.parent(of: path))
    }

    func run(_ descriptor: [UInt8], _ stop: StopFlag) throws -> Manifest {
        let file = try ManifestFile(descriptor, name: path)
        var manifest = try file.valid(name: path)
        guard !manifest.disks.isEmpty else {
            throw MigrationError(.invalidArgument, "\(path): disks: has none", hint: "add the VM's disks")
        }
        // Whoever wrote it was the source once; from now on the file is.
        manifest.migrationID = ""
        manifest.source.kind = .manifest
        for index in manifest.disks.indices {
            try stop.check()
            try resolve(&manifest.disks[index], "disks[\(index)]", isOwn: file.form == .flotilla)
        }
        return manifest
    }

    private func resolve(_ disk: inout Disk, _ place: String, isOwn: Bool) throws {
        let owner = "\(path): \(place)"
        let named = disk.source.path
        // What an earlier migration made of it is not the source.
        disk.clearTarget()
        let region = try find(named, owner)
        disk.source.path = region.path
        // The content alone; what VMware calls the VMDK is a descriptor beside it.
        if !isOwn, disk.source.format == "vmdk", region.path.hasSuffix("-flat.vmdk") { disk.source.format = "raw" }
        let (start, overflow) = disk.source.offset.addingReportingOverflow(isOwn ? disk.source.length : 0)
        guard !overflow, start <= region.length else {
            throw MigrationError(
                .dataLoss, "\(owner): \(named.printable) has \(region.length) bytes, the manifest speaks of \(start)",
                hint: "copy the file again")
        }
        let part = Region(
            path: region.path, offset: disk.source.offset,
            length: isOwn && disk.source.length > 0 ? disk.source.length : region.length - disk.source.offset,
            resolved: region.resolved)
        let capacity = try capacity(&disk, part, owner)
        if isOwn {
            guard capacity == 0 || disk.capacityBytes == capacity else {
                throw MigrationError(
                    .dataLoss,
                    "\(owner): \(named.printable) holds a disk of \(capacity) bytes, the manifest says "
                        + "\(disk.capacityBytes)", hint: "name the file that the manifest was made of")
            }
        } else {
            let said = disk.source.length
            guard said == 0 || said == region.length || said == capacity else {
                throw MigrationError(
                    .dataLoss,
                    "\(owner): \(named.printable) has \(region.length) bytes\(capacity == 0 ? "" : " and holds a disk of \(capacity)"), "
                        + "the manifest says \(said)", hint: "copy the file again, or correct 'bytes'")
            }
            disk.capacityBytes = capacity
            disk.source.length = 0
        }
    }

    private func find(_ name: String, _ owner: String) throws -> Region {
        guard name.hasPrefix("/") else { return try folder.file(name, owner: owner, remedy: Self.remedy) }
        guard Files.exists(name) else {
            throw MigrationError(
                .notFound, "\(owner): there is no file \(name.printable)", hint: "copy it there, or correct its path")
        }
        try allow(name)
        return try Region.whole(name)
    }

    /// What the guest sees, in bytes.
    private func capacity(_ disk: inout Disk, _ part: Region, _ owner: String) throws -> UInt64 {
        switch disk.source.format {
        case "vmdk":
            let summary = try VMDKSummary(part, owner: "\(owner): \(part.path)")
            guard !summary.isDelta else {
                throw MigrationError(
                    .unimplemented, "\(owner): \(part.path) is a snapshot's delta",
                    hint: "consolidate the VM's disks on the source and export it again")
            }
            // Its extents are looked for beside it, and nowhere else.
            let beside = SourceFolder(path: Files.parent(of: part.path))
            if !summary.extents.isEmpty {
                _ = try VMDKChain(Files.name(of: part.path), in: beside, owner: owner).files(in: beside)
            }
            disk.source.variant = summary.createType
            disk.thin = disk.thin || summary.thin
            return summary.capacity
        case "raw":
            guard part.length > 0, part.length % 512 == 0 else {
                throw MigrationError(
                    .dataLoss, "\(owner): a raw disk of \(part.length) bytes is no multiple of 512",
                    hint: "copy the file again, or correct its format")
            }
            return part.length
        default: return try ForeignImage.capacity(part, format: disk.source.format, owner: owner)
        }
    }
}
