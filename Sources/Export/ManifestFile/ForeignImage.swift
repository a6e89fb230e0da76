import Glibc
import HostKit
import MigrationModel

/// Sizes of images that qemu-img reads for us, from their headers: QEMU's docs/interop/qcow2.txt, Microsoft's "Virtual
/// Hard Disk Image Format Specification" and [MS-VHDX], VirtualBox's VDICore.h.
enum ForeignImage {
    /// - Parameter format: as qemu-img calls it.
    static func capacity(_ region: Region, format: String, owner: String) throws -> UInt64 {
        guard region.offset == 0 else {
            throw MigrationError(
                .unimplemented, "\(owner): a \(format) image inside of another file is not read",
                hint: "extract it into a file of its own")
        }
        let file = try region.open()
        func bytes(_ offset: UInt64, _ count: Int) throws -> [UInt8] {
            guard offset <= region.length, UInt64(count) <= region.length - offset else {
                throw MigrationError(.dataLoss, "\(owner): \(region.path) is truncated", hint: "copy the file again")
            }
            return try file.readExactly(at: offset, count: count)
        }
        func big(_ offset: UInt64) throws -> UInt64 { try bytes(offset, 8).reduce(0) { $0 << 8 | UInt64($1) } }
        func little(_ offset: UInt64, _ count: Int = 8) throws -> UInt64 {
            try bytes(offset, count).reversed().reduce(0) { $0 << 8 | UInt64($1) }
        }
        func require(_ magic: [UInt8], at offset: UInt64) throws {
            guard try bytes(offset, magic.count) == magic else {
                throw MigrationError(
                    .invalidArgument, "\(owner): \(region.path) is no \(format) image", hint: "correct its format")
            }
        }
        let capacity: UInt64
        switch format {
        case "qcow2":
            try require([0x51, 0x46, 0x49, 0xFB], at: 0)
            guard try big(8) == 0 else {
                throw MigrationError(
                    .failedPrecondition, "\(owner): \(region.path) depends on another image (a backing file)",
                    hint: "merge them with qemu-img convert where that file is known and trusted")
            }
            capacity = try big(24)
        case "vdi":
            try require([0x7F, 0x10, 0xDA, 0xBE], at: 64)
            capacity = try little(0x170)
        case "vpc":
            guard region.length >= 512 else {
                throw MigrationError(.dataLoss, "\(owner): \(region.path) is truncated", hint: "copy the file again")
            }
            let footer = region.length - 512
            try require(Array("conectix".utf8), at: footer)
            // 2 is fixed, 3 dynamic; 4 is a difference to another file, of which qemu-img says nothing.
            guard try [2, 3].contains(bytes(footer + 60, 4).reduce(0) { $0 << 8 | UInt64($1) }) else {
                throw MigrationError(
                    .failedPrecondition, "\(owner): \(region.path) depends on another image (a differencing disk)",
                    hint: "merge it with its parent on the machine that it comes from")
            }
            capacity = try big(footer + 48)
        case "vhdx":
            try require(Array("vhdxfile".utf8), at: 0)
            capacity = try virtualDiskSize(little, owner)
        default:
            throw MigrationError(
                .unimplemented, "\(owner): disks of the format '\(format.printable)' are not read",
                hint: "convert it with qemu-img to qcow2")
        }
        // qemu-img rounds up to whole sectors.
        guard capacity > 0, capacity <= 1 << 50 else {
            throw MigrationError(.invalidArgument, "\(owner): \(region.path) states a size of \(capacity) bytes")
        }
        return (capacity + 511) / 512 * 512
    }

    /// The region table at 192 KiB (or its copy at 256 KiB) leads to the metadata, whose table to the item.
    private static func virtualDiskSize(_ little: (UInt64, Int) throws -> UInt64, _ owner: String) throws -> UInt64 {
        // GUIDs 8B7CA206-4790-4B9A-B8FE-575F050F886E and 2FA54224-CD1B-4876-B211-5DBED83BF4B8 as they lie in files.
        let metadata: (UInt64, UInt64) = (0x4B9A_4790_8B7C_A206, 0x6E88_0F05_5F57_FEB8)
        let size: (UInt64, UInt64) = (0x4876_CD1B_2FA5_4224, 0xB8F4_3BD8_BE5D_11B2)
        for table: UInt64 in [192 << 10, 256 << 10] where try little(table, 4) == 0x6967_6572 {
            for entry in 0..<min(try little(table + 8, 4), 2047) {
                let at = table + 16 + entry * 32
                guard try (little(at, 8), little(at + 8, 8)) == metadata else { continue }
                // Far beyond any file, and small enough to count on from.
                let start = min(try little(at + 16, 8), 1 << 60)
                for item in 0..<min(try little(start + 10, 2), 2047) {
                    let at = start + 32 + item * 32
                    guard try (little(at, 8), little(at + 8, 8)) == size else { continue }
                    return try little(start + little(at + 16, 4), 8)
                }
            }
        }
        throw MigrationError(.dataLoss, "\(owner): the VHDX states no size", hint: "copy the file again")
    }
}
