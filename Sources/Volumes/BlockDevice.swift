import CLinux
import DiskImage
import Glibc
import HostKit
import MigrationModel

/// A block device of this host, open exclusively: while this exists the kernel lets nobody mount it, add it to a RAID
/// or open it the same way. Written past the page cache.
package final class BlockDevice: Volume {
    package let name: String
    package let size: UInt64
    package let blockSize: Int
    package let isDirect = true
    /// Who uses it, for people; nil unless it was opened for a look.
    package let use: String?
    private let file: File

    /// For a look only: claims nothing, and what is in use can be looked at as well.
    package init(reading path: String) throws {
        name = path
        let resolved = try Files.canonical(path)
        guard Self.isDevice(resolved) else { throw Self.notADevice(path) }
        use = try BlockDeviceUse.find(resolved)
        file = try File(resolved, O_RDONLY)
        (size, blockSize) = try Self.measure(file)
    }

    /// Throws `failedPrecondition` when something uses the device or one of its partitions, or it is read-only. Changes
    /// nothing.
    package init(_ path: String) throws {
        name = path
        let resolved = try Files.canonical(path)
        guard Self.isDevice(resolved) else { throw Self.notADevice(path) }
        use = nil
        if let use = try BlockDeviceUse.find(resolved) { throw Self.inUse(path, use) }
        do {
            file = try File(resolved, O_RDWR | O_EXCL | flotilla_o_direct())
        } catch  where errno == EBUSY {
            throw Self.inUse(path, "the kernel has it in use (another mount, swap, a RAID, another conversion)")
        }
        (size, blockSize) = try Self.measure(file)
        guard flotilla_device_is_read_only(file.descriptor) == 0 else {
            throw MigrationError(
                .failedPrecondition, "\(path) is read-only", hint: "blockdev --setrw makes it writable")
        }
        guard blockSize <= Chunk.clusterSize else {
            throw MigrationError(.unimplemented, "\(path): blocks of \(blockSize) bytes are too large")
        }
    }

    private static func measure(_ file: File) throws -> (UInt64, Int) {
        let (size, blockSize) = (flotilla_device_size(file.descriptor), flotilla_device_block_size(file.descriptor))
        guard size >= 0, blockSize > 0 else { throw systemError("ask for the size of", file.path) }
        return (UInt64(size), Int(blockSize))
    }

    private static func notADevice(_ path: String) -> MigrationError {
        MigrationError(.invalidArgument, "\(path): not a block device")
    }

    package static func isDevice(_ path: String) -> Bool {
        var info = stat()
        return stat(path, &info) == 0 && info.st_mode & S_IFMT == S_IFBLK
    }

    private static func inUse(_ path: String, _ use: String) -> MigrationError {
        MigrationError(
            .failedPrecondition, "\(path) is in use: \(use)",
            hint: "release it first, or choose another device; nothing was written to it")
    }

    package func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
        guard try file.read(at: offset, into: buffer) == buffer.count else {
            throw MigrationError(.dataLoss, "\(name): ended within \(buffer.count) bytes at byte \(offset)")
        }
    }

    package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws {
        try file.write(bytes, at: offset)
    }

    /// Never by BLKDISCARD: what a device reads after that is up to the device.
    package func zero(_ range: Range<UInt64>) throws {
        let count = range.upperBound - range.lowerBound
        while flotilla_punch_hole(file.descriptor, range.lowerBound, count) != 0 {
            if errno == EINTR { continue }
            guard errno == EOPNOTSUPP || errno == EINVAL || errno == ENODEV else {
                throw systemError("zero at byte \(range.lowerBound) of", name)
            }
            guard flotilla_device_zero(file.descriptor, range.lowerBound, count) == 0 else {
                throw systemError("zero at byte \(range.lowerBound) of", name)
            }
            return
        }
    }

    package func flush() throws { try file.synchronize() }

    package func contents() throws -> String? { try recognise(self) }
}
