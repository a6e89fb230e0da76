import HostKit
import MigrationModel

/// VMware's virtual disk format, read only ("Virtual Disk Format 5.0", VMware 2011). All numbers are little-endian,
/// all offsets count 512-byte sectors from the start of the extent.
///
/// A disk is described by a **descriptor**: text with `CID`, `parentCID`, `createType` and one line per **extent**.
/// It is a file of its own, or embedded in the only extent.
///
/// - *Flat* extents (`FLAT`, `VMFS`) hold the guest's bytes as they are.
/// - *Hosted sparse* extents (`SPARSE`) begin with a 512-byte header. A **grain directory** points to **grain tables**
///   of 512 entries; each entry points to a **grain** (64 KiB as a rule), is 0 for a grain never written, or 1 for one
///   known to be zero (header flag 4).
/// - *streamOptimized* is a hosted sparse extent written front to back: each grain is a 12-byte marker (its first
///   guest sector as 64 bits, its compressed size as 32) and a zlib stream, padded to a sector. The directory isn't
///   known when the header is written, so its offset there is all ones; the real one is in a copy of the header, the
///   **footer**: footer marker, footer, end-of-stream marker (a sector of zeros) are the last three sectors. Some
///   writers (QEMU) reserve space for the directory instead and write no footer.
///
/// A disk whose `parentCID` isn't `ffffffff` holds only the changes since a snapshot; `parentFileNameHint` names the
/// disk with the rest, whose `CID` must still be that.
package enum VMDK {
    static let sectorSize: UInt64 = 512
    private static let descriptorLimit: UInt64 = 1 << 20

    static func open(_ region: FileRegion) throws -> any DiskSource {
        let (file, source) = try region.open()
        let start = try file.readExactly(at: source.offset, count: Int(min(source.length, 512)))
        if let (disk, descriptor) = try openLayer(file, source, start) {
            guard let descriptor, descriptor.isDelta else { return disk }
            guard source.offset == 0, source.length == source.identity.size else {
                try descriptor.requireWholeDisk(name: source.path)
                return disk
            }
            return try Chain(disk, descriptor, file: source)
        }
        try refuseForeign(start, name: region.path)
        throw MigrationError(
            .invalidArgument, "\(region.path): not a VMDK: neither a sparse header nor a descriptor at its start",
            hint: start.isEmpty ? "the file is empty" : "a -flat.vmdk holds raw data: give its descriptor instead")
    }

    /// A disk of a chain.
    static func openLayer(_ region: FileRegion) throws -> (ExtentDisk, Descriptor?) {
        let path = region.path
        let (file, source) = try region.open()
        let start = try file.readExactly(at: 0, count: Int(min(source.length, 512)))
        if let layer = try openLayer(file, source, start) { return layer }
        try refuseForeign(start, name: path)
        throw MigrationError(.invalidArgument, "\(path): not a VMDK")
    }

    /// nil when it doesn't look like a VMDK.
    private static func openLayer(
        _ file: File, _ source: SourceFile, _ start: [UInt8]
    ) throws -> (ExtentDisk, Descriptor?)? {
        if isHostedSparse(start) { return try openSparse(file, source) }
        if isDescriptor(start) { return try openDescriptor(file, source) }
        return nil
    }

    static func isHostedSparse(_ start: [UInt8]) -> Bool { start.starts(with: "KDMV".utf8) }

    static func isDescriptor(_ start: [UInt8]) -> Bool {
        let text = start.drop { $0 <= 0x20 || $0 == 0xEF || $0 == 0xBB || $0 == 0xBF }
        let line = String(decoding: text.prefix(22), as: UTF8.self).lowercased()
        // The second spelling is that of VMDKstream, another writer of disks for ESX.
        return line.hasPrefix("# disk descriptorfile") || line == "# disk descriptor file"
    }

    /// Throws for formats that are recognised and not read here, naming them and the way round.
    static func refuseForeign(_ start: [UInt8], name: String) throws {
        let known: [(magic: [UInt8], format: String, hint: String)] = [
            (Array("COWD".utf8), "a vmfsSparse snapshot extent", "consolidate the VM's snapshots, then export again"),
            (
                [0xBE, 0xBA, 0xFE, 0xCA, 0, 0, 0, 0], "an seSparse snapshot extent",
                "consolidate the VM's snapshots, then export again"
            ),
            ([0x51, 0x46, 0x49, 0xFB], "a qcow2 image", "use it as it is"),
            (Array("vhdxfile".utf8), "a VHDX image", "convert it with qemu-img first"),
            (Array("conectix".utf8), "a VHD image", "convert it with qemu-img first"),
        ]
        for entry in known where start.starts(with: entry.magic) {
            throw MigrationError(.unimplemented, "\(name): \(entry.format) isn't read here", hint: entry.hint)
        }
    }

    private static func openSparse(_ file: File, _ source: SourceFile) throws -> (ExtentDisk, Descriptor?) {
        let extent = try SparseExtent(file, source)
        var found: Descriptor?
        if let place = extent.descriptor {
            let bytes = try file.readExactly(
                at: source.offset + place.sector * sectorSize, count: Int(place.sectors * sectorSize))
            let descriptor = try Descriptor(parsing: bytes, name: "\(source.path) (embedded descriptor)")
            try descriptor.requireKnownKind(name: source.path)
            found = descriptor
            guard descriptor.extents.count == 1 else {
                throw MigrationError.malformed(
                    source.path, "its embedded descriptor names \(descriptor.extents.count) extents instead of itself")
            }
        }
        let kind = extent.header.isCompressed ? "streamOptimized" : "monolithicSparse"
        return (try ExtentDisk([extent], formatName: "VMDK \(kind)", files: [source], name: source.path), found)
    }

    private static func openDescriptor(_ file: File, _ source: SourceFile) throws -> (ExtentDisk, Descriptor?) {
        guard source.length <= descriptorLimit else {
            throw MigrationError.malformed(source.path, "a descriptor of \(source.length) bytes is implausible")
        }
        let bytes = try file.readExactly(at: source.offset, count: Int(source.length))
        let descriptor = try Descriptor(parsing: bytes, name: source.path)
        try descriptor.requireKnownKind(name: source.path)
        guard !descriptor.extents.isEmpty else {
            throw MigrationError.malformed(source.path, "the descriptor names no extent")
        }
        guard source.offset == 0, source.length == source.identity.size else {
            throw MigrationError(
                .unimplemented, "\(source.path): a descriptor inside another file can't name extents beside it",
                hint: "extract the archive and give the descriptor's path")
        }
        var extents: [any Extent] = []
        var files = [source]
        for line in descriptor.extents {
            guard let (extent, file) = try openExtent(line, beside: source) else {
                extents.append(ZeroExtent(capacity: line.sectors * sectorSize))
                continue
            }
            extents.append(extent)
            files.append(file)
        }
        let disk = try ExtentDisk(
            extents, formatName: "VMDK \(descriptor.createType)", files: files, name: source.path)
        return (disk, descriptor)
    }

    /// nil for an extent of zeros.
    private static func openExtent(
        _ line: Descriptor.ExtentLine, beside owner: SourceFile
    ) throws -> (any Extent, SourceFile)? {
        guard line.kind != .zero else { return nil }
        let descriptor = owner.path
        let region = try resolve(line.fileName, beside: descriptor, isResolved: owner.isResolved)
        let path = region.path
        let (file, source) = try region.open()
        let bytes = line.sectors * sectorSize
        switch line.kind {
        case .zero: return nil
        case .flat:
            let start = line.offset * sectorSize
            guard start + bytes <= source.length else {
                throw MigrationError.truncated(
                    path, "the descriptor \(descriptor) says it holds \(start + bytes) bytes, it has \(source.length)",
                    missing: start + bytes - source.length)
            }
            let extent = FlatExtent(capacity: bytes, file: source, fileOffset: start, stored: bytes)
            return (extent, source)
        case .sparse:
            let extent = try SparseExtent(file, source)
            guard extent.header.capacity >= line.sectors else {
                throw MigrationError.malformed(
                    path, "holds \(extent.header.capacity) sectors where \(descriptor) says \(line.sectors)")
            }
            return (extent.limited(to: bytes), source)
        }
    }
}
