package import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel

/// SHA-256 over path, size and modification time of every file of a manifest's source, hexadecimal. Computed from the
/// files as they are now: differs from `source.fingerprint` when the source changed since its capture.
///
/// - Throws: `notFound` when a file is gone, `invalidArgument` for a manifest that isn't from an OVA, OVF, VMX or manifest.
package func fingerprint(of manifest: Manifest) throws -> String {
    let digest = Digest()
    var seen: Set<String> = []
    for path in try sourceFiles(of: manifest) where seen.insert(path).inserted {
        digest.update(Array(try identity(of: path).utf8))
    }
    return hex(digest.finalize())
}

/// One line: the path's length and the path, size, modification time in nanoseconds.
func identity(of path: String) throws -> String {
    var info = stat()
    guard stat(path, &info) == 0 else { throw systemError("stat", path) }
    return "\(path.utf8.count):\(path) \(info.st_size) \(info.st_mtim.tv_sec).\(info.st_mtim.tv_nsec)\n"
}

private func sourceFiles(of manifest: Manifest) throws -> [String] {
    let path = manifest.source.path
    let folder = SourceFolder(path: Files.parent(of: path))
    var files = [path]
    switch manifest.source.kind {
    case .ova: return files
    case .ovf:
        let stem = path.lowercased().hasSuffix(".ovf") ? String(path.dropLast(4)) : path
        if Files.exists(stem + ".mf") { files.append(stem + ".mf") }
    case .vmx: break
    case .manifest: return files + (try manifest.disks.flatMap(filesOfManifestDisk))
    default:
        throw MigrationError(
            .invalidArgument, "the manifest of \(manifest.vm.name) is not from an OVA, OVF, VMX or manifest file")
    }
    for disk in manifest.disks where disk.hasSource {
        let prefix = folder.path == "/" ? "/" : folder.path + "/"
        guard disk.source.path.hasPrefix(prefix) else {
            throw MigrationError(
                .invalidArgument, "\(disk.id): \(disk.source.path) does not lie in the source's folder \(folder.path)")
        }
        let name = String(disk.source.path.dropFirst(prefix.count))
        files += try VMDKChain(name, in: folder, owner: path).files(in: folder)
    }
    return files
}

/// A disk's file and, of a VMDK with extents, those beside it.
private func filesOfManifestDisk(_ disk: Disk) throws -> [String] {
    guard disk.source.format == "vmdk", disk.source.offset == 0 else { return [disk.source.path] }
    let beside = SourceFolder(path: Files.parent(of: disk.source.path))
    return try VMDKChain(Files.name(of: disk.source.path), in: beside, owner: disk.id).files(in: beside)
}
