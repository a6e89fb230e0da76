import HostKit
import MigrationModel

/// The formats this module reads itself. Others (vhdx, vdi, qcow2 as input) are qemu-img's.
package enum DiskFormat: String, Sendable, CaseIterable {
    case vmdk
    case raw

    /// Opens a disk without changing it. Metadata is validated here; tables and data are read on demand.
    package func open(_ region: FileRegion) throws -> any DiskSource {
        switch self {
        case .vmdk: try VMDK.open(region)
        case .raw: try Raw.open(region)
        }
    }

    /// Tells VMDK by its content. Never answers `.raw`: a guest can write any header into a raw disk, so raw is
    /// something only the person or the manifest says.
    package static func detect(_ region: FileRegion) throws -> DiskFormat {
        let (file, source) = try region.open()
        let start = try file.readExactly(at: source.offset, count: Int(min(source.length, 512)))
        if VMDK.isHostedSparse(start) || VMDK.isDescriptor(start) { return .vmdk }
        try VMDK.refuseForeign(start, name: region.path)
        throw MigrationError(
            .invalidArgument, "\(region.path): not a VMDK",
            hint: "if it is a raw disk, say so: -f raw (for the second of two images -F raw)")
    }
}

package enum TargetFormat: String, Sendable, CaseIterable {
    case qcow2
    case raw
}
