import CBlkid
import CLinux
import DiskImage
import Glibc
import HostKit
import MigrationModel

/// What libblkid recognises on a volume (file systems, RAID, LVM, LUKS, swap, partition tables), for people; nil for
/// nothing. All it knows lies near either end of a volume, so it is shown just those.
func recognise(_ volume: any Volume) throws -> String? {
    let descriptor = flotilla_memory_file("volume-ends")
    guard descriptor >= 0 else { throw systemError("memfd_create for", volume.name) }
    defer { close(descriptor) }
    guard ftruncate(descriptor, Int(volume.size)) == 0 else { throw systemError("memfd for", volume.name) }
    let end = min(volume.size, 8 << 20)
    for range in [0..<end, max(end, volume.size - end)..<max(end, volume.size)] where !range.isEmpty {
        let bytes = try volume.read(at: range.lowerBound, count: range.count)
        guard pwrite(descriptor, bytes, bytes.count, Int(range.lowerBound)) == bytes.count else {
            throw systemError("memfd for", volume.name)
        }
    }
    return try recognise(descriptor, volume.name)
}

private func recognise(_ descriptor: Int32, _ name: String) throws -> String? {
    guard let probe = blkid_new_probe() else {
        throw MigrationError(.resourceExhausted, "\(name): libblkid: no memory")
    }
    defer { blkid_free_probe(probe) }
    guard blkid_probe_set_device(probe, descriptor, 0, 0) == 0,
        blkid_probe_enable_superblocks(probe, 1) == 0,
        blkid_probe_set_superblocks_flags(
            probe, BLKID_SUBLKS_TYPE | BLKID_SUBLKS_USAGE | BLKID_SUBLKS_LABEL | BLKID_SUBLKS_BADCSUM) == 0,
        blkid_probe_enable_partitions(probe, 1) == 0,
        // Also a table whose protective MBR is gone.
        blkid_probe_set_partitions_flags(probe, BLKID_PARTS_FORCE_GPT) == 0
    else { throw MigrationError(.internal, "\(name): libblkid can't probe it") }
    func value(_ key: String) -> String? {
        var text: UnsafePointer<CChar>?
        guard blkid_probe_lookup_value(probe, key, &text, nil) == 0, let text else { return nil }
        return String(cString: text)
    }
    switch blkid_do_safeprobe(probe) {
    case 1: return nil
    case -2: return "signatures of more than one kind"
    case 0: break
    default: throw MigrationError(.internal, "\(name): libblkid failed to probe it")
    }
    let label = value("LABEL").map { " labelled \"\($0)\"" } ?? ""
    switch (value("TYPE"), value("USAGE")) {
    case (let type?, "filesystem"): return "a file system (\(type))\(label)"
    case (let type?, "raid"): return "a part of a RAID or volume group (\(type))"
    case (let type?, "crypto"): return "an encrypted volume (\(type))"
    case (let type?, _): return "data (\(type))\(label)"
    case (nil, _): return "a partition table (\(value("PTTYPE") ?? "of unknown kind"))"
    }
}
