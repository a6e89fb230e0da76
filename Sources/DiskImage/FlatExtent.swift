import Glibc
import HostKit
import MigrationModel

/// Guest sectors stored byte for byte in a file: raw disks, `-flat.vmdk`.
struct FlatExtent: Extent {
    /// Guest bytes; up to 511 more than `stored` for a raw file that doesn't end on a sector.
    let capacity: UInt64
    let file: SourceFile
    let fileOffset: UInt64
    /// Bytes in the file. The rest of the capacity reads as zero.
    let stored: UInt64

    func makeReader() throws -> sending any ExtentReader { Reader(self, try file.open()) }

    private final class Reader: ExtentReader {
        private let extent: FlatExtent
        private let file: File

        init(_ extent: FlatExtent, _ file: File) {
            self.extent = extent
            self.file = file
        }

        /// lseek(2)'s SEEK_DATA (3) and SEEK_HOLE (4), which glibc hides behind _GNU_SOURCE. A file system without an
        /// extent map says that everything is data.
        private func seek(_ offset: UInt64, _ whence: Int32) throws -> UInt64? {
            let result = lseek(file.descriptor, off_t(extent.fileOffset + offset), whence)
            if result >= 0 { return UInt64(result) - extent.fileOffset }
            switch errno {
            case ENXIO: return nil
            case EINVAL, EOPNOTSUPP: return whence == 3 ? offset : extent.stored
            default: throw systemError("seek", file.path)
            }
        }

        func nextData(from offset: UInt64) throws -> UInt64? {
            guard offset < extent.stored, let data = try seek(offset, 3), data < extent.stored else { return nil }
            return data
        }

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> Bool {
            let end = min(offset + UInt64(buffer.count), extent.stored)
            var position = offset
            var hasData = false
            while position < end, let data = try nextData(from: position), data < end {
                let hole = min(try seek(data, 4) ?? end, end)
                // A hole punched between the two calls: ask again.
                guard hole > data else { continue }
                zero(slice(buffer, position - offset, data - offset))
                let part = slice(buffer, data - offset, hole - offset)
                let got = try file.read(at: extent.fileOffset + data, into: part)
                guard got == part.count else {
                    throw MigrationError.truncated(
                        extent.file.path, "it ended at byte \(extent.fileOffset + data + UInt64(got)) while being read",
                        missing: extent.stored - data - UInt64(got))
                }
                hasData = true
                position = hole
            }
            if hasData { zero(slice(buffer, position - offset, UInt64(buffer.count))) }
            return hasData
        }

        private func slice(
            _ buffer: UnsafeMutableRawBufferPointer, _ from: UInt64, _ to: UInt64
        ) -> UnsafeMutableRawBufferPointer {
            UnsafeMutableRawBufferPointer(rebasing: buffer[Int(from)..<Int(to)])
        }
    }
}

/// The raw format: byte n of the file is byte n of the disk. A size that isn't a multiple of 512 is rounded up, as
/// QEMU does; the added bytes read as zero.
package enum Raw {
    static func open(_ region: FileRegion) throws -> any DiskSource {
        let (_, source) = try region.open()
        guard source.length <= Chunk.maximumCapacity else { throw tooLarge(region.path, "\(source.length) bytes") }
        let extent = FlatExtent(
            capacity: (source.length + 511) / 512 * 512, file: source, fileOffset: source.offset, stored: source.length)
        return try ExtentDisk([extent], formatName: "raw", files: [source], name: region.path)
    }
}
