import Glibc
import HostKit
import MigrationModel

/// What a manifest says of a VMDK, read from its descriptor or sparse header; its grains are left alone. After VMware's
/// "Virtual Disk Format 5.0".
struct VMDKSummary {
    struct Extent {
        let sectors: UInt64
        /// FLAT, SPARSE, VMFS, VMFSSPARSE, ZERO, ...
        let kind: String
        /// As the descriptor names it; empty for ZERO.
        let file: String
    }

    /// Guest-visible size in bytes.
    var capacity: UInt64
    /// "streamOptimized", "monolithicFlat", ...; empty when the image doesn't say.
    var createType = ""
    var parentCID = ""
    var parentFile = ""
    var thin = false
    /// Canonical form, or empty.
    var uuid = ""
    /// Extents in files of their own; empty when the image is one sparse file.
    var extents: [Extent] = []

    static let descriptorLimit = 1 << 20
    private static let sector: UInt64 = 512

    var isDelta: Bool { !parentCID.isEmpty && parentCID != "ffffffff" }

    /// - Parameter owner: what the messages call the image.
    init(_ region: Region, owner: String) throws {
        let file = try region.open()
        guard region.length >= 4 else {
            throw MigrationError(.dataLoss, "\(owner): \(region.length) bytes are too few for a VMDK")
        }
        let head = try file.readExactly(at: region.offset, count: Int(min(region.length, Self.sector)))
        if head.starts(with: "KDMV".utf8) {
            guard head.count == 512 else { throw MigrationError(.dataLoss, "\(owner): truncated VMDK header") }
            capacity = try Self.bytes(Self.little(head, 12, 8), owner)
            let start = try Self.bytes(Self.little(head, 28, 8), owner)
            let length = try Self.bytes(Self.little(head, 36, 8), owner)
            if start > 0 && length > 0 {
                guard length <= UInt64(Self.descriptorLimit) else {
                    throw MigrationError(.invalidArgument, "\(owner): embedded descriptor of \(length) bytes")
                }
                guard start <= region.length, length <= region.length - start else {
                    throw MigrationError(
                        .dataLoss,
                        "\(owner): truncated: its embedded descriptor ends at byte \(start + length), "
                            + "the image at byte \(region.length)")
                }
                let text = try file.readExactly(at: region.offset + start, count: Int(length))
                try read(VMDKDescriptor(text, owner: owner))
                extents = []
            }
        } else if head.starts(with: "COWD".utf8) {
            guard head.count == 512 else { throw MigrationError(.dataLoss, "\(owner): truncated VMDK header") }
            capacity = try Self.bytes(Self.little(head, 12, 4), owner)
            createType = "vmfsSparse"
        } else if region.length <= UInt64(Self.descriptorLimit) {
            let text = try region.read(limit: Self.descriptorLimit, name: owner)
            guard VMDKDescriptor.isDescriptor(text) else { throw Self.foreign(owner) }
            capacity = 0
            let descriptor = try VMDKDescriptor(text, owner: owner)
            for extent in descriptor.extents {
                let (sum, overflow) = capacity.addingReportingOverflow(try Self.bytes(extent.sectors, owner))
                guard !overflow, sum <= UInt64(Int64.max) else {
                    throw MigrationError(.invalidArgument, "\(owner): its extents exceed 2^63 - 1 bytes")
                }
                capacity = sum
            }
            read(descriptor)
        } else {
            throw Self.foreign(owner)
        }
        guard capacity > 0 else { throw MigrationError(.invalidArgument, "\(owner): states a size of 0 bytes") }
    }

    private mutating func read(_ descriptor: VMDKDescriptor) {
        createType = descriptor["createType"] ?? ""
        parentCID = descriptor["parentCID"]?.lowercased() ?? ""
        parentFile = descriptor["parentFileNameHint"] ?? ""
        thin = descriptor["ddb.thinProvisioned"] == "1"
        uuid = descriptor["ddb.uuid"]?.canonicalUUID ?? descriptor["ddb.uuid.image"]?.canonicalUUID ?? ""
        extents = descriptor.extents
    }

    private static func foreign(_ owner: String) -> MigrationError {
        MigrationError(
            .invalidArgument, "\(owner): is not a VMDK: neither a sparse header nor a descriptor at its start",
            hint: "name the descriptor (disk.vmdk), not its extent (disk-flat.vmdk)")
    }

    private static func bytes(_ sectors: UInt64, _ owner: String) throws -> UInt64 {
        try checkedBytes(sectors, times: sector, "\(owner): size")
    }

    private static func little(_ bytes: [UInt8], _ offset: Int, _ count: Int) -> UInt64 {
        bytes[offset..<(offset + count)].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}
