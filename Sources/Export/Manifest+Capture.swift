package import FlotillaProtocol
import Glibc
package import HostKit
import MigrationModel
import SwiftProtobuf

/// Reads everything a file source states about one VM. The source is only read, its disks' contents not even that.
/// Blocking; takes milliseconds. `migration_id` and `created_by` are left to the caller.
///
/// - Parameters:
///   - vmName: which VM of a source that holds several; nil when there is one.
///   - stop: checked between disks.
///   - allow: throws for a file that must not be read although a manifest names it by an absolute path.
/// - Throws: `invalidArgument` for descriptors that can't be right, `notFound` for files they name that aren't there,
///   `dataLoss` for truncated or altered files, `unimplemented` for features with no reader, `failedPrecondition` for
///   an encrypted VM or a source that changed meanwhile. What merely blocks the migration is a BLOCKED finding.
package func captureManifest(
    from source: SourceURL, vmName: String?, stop: StopFlag, allow: @escaping (String) throws -> Void = { _ in }
) throws -> Manifest {
    try stop.check()
    let before = try identity(of: source.path)
    var manifest: Manifest
    let descriptor: [UInt8]
    switch source.kind {
    case .vmx:
        descriptor = try Region.whole(source.path).read(limit: VMXFile.sizeLimit, name: source.path)
        var capture = try VMXCapture(descriptor, path: source.path)
        manifest = try capture.run(stop)
        if let vmName, vmName != manifest.vm.name {
            throw MigrationError(
                .notFound, "\(source.path): describes \(manifest.vm.name.printable), not \(vmName.printable)",
                hint: "leave --vm out, or give the VMX of the VM you mean")
        }
        manifest.source.kind = .vmx
    case .ovf, .ova:
        let package = source.kind == .ova ? try OVFPackage(ova: source.path) : try OVFPackage(ovf: source.path)
        descriptor = package.descriptor
        var capture = try OVFCapture(package, vmName: vmName)
        manifest = try capture.run(stop)
        manifest.source.kind = source.kind == .ova ? .ova : .ovf
    case .manifest:
        descriptor = try ManifestFile.read(source.path)
        manifest = try ManifestCapture(path: source.path, allow: allow).run(descriptor, stop)
        if let vmName, vmName != manifest.vm.name {
            throw MigrationError(
                .notFound, "\(source.path): describes \(manifest.vm.name.printable), not \(vmName.printable)",
                hint: "leave --vm out, or give the manifest of the VM you mean")
        }
    }
    manifest.schemaVersion = 1
    manifest.source.url = source.description
    manifest.source.path = source.path
    manifest.source.descriptorSha256 = hex(Digest.hash(.sha256, descriptor))
    manifest.source.fingerprint = try fingerprint(of: manifest)
    guard try identity(of: source.path) == before else {
        throw MigrationError(
            .failedPrecondition, "\(source.path): changed while it was read",
            hint: "wait until whatever writes it is done, and run the same command again")
    }
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    manifest.capturedAt.seconds = Int64(now.tv_sec)
    manifest.capturedAt.nanos = Int32(now.tv_nsec)
    return manifest
}
