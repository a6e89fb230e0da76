import Glibc
import HostKit
import MigrationModel

extension VMDK {
    /// Compressed grains of a streamOptimized extent. Reads them through a window on the file, since grains that
    /// follow each other in the guest nearly always do so in the file. One thread at a time.
    final class GrainStream {
        private static let markerSize = 12

        private let extent: SparseExtent
        private let file: File
        private let inflater = Inflater()
        private let window: UnsafeMutableRawBufferPointer
        /// Offset in the extent of the window's first byte, and how many bytes of it are valid.
        private var windowStart: UInt64 = 0
        private var windowCount = 0
        private let grain: UnsafeMutableRawBufferPointer

        init(_ extent: SparseExtent, _ file: File) {
            self.extent = extent
            self.file = file
            let record = GrainStream.markerSize + GrainStream.maximumCompressed(extent.header.grainSize)
            window = .allocate(byteCount: max(record, 1 << 20), alignment: 4096)
            grain = .allocate(byteCount: extent.header.grainSize, alignment: 4096)
        }

        deinit {
            window.deallocate()
            grain.deallocate()
        }

        /// zlib adds less than 0.1% to data it can't compress; writers round up generously.
        static func maximumCompressed(_ grainSize: Int) -> Int { grainSize + grainSize / 8 + 64 }

        func read(_ pieces: [Piece], into buffer: UnsafeMutableRawBufferPointer) throws {
            let largest = UInt64(GrainStream.markerSize + GrainStream.maximumCompressed(extent.header.grainSize))
            let horizon = (pieces.map(\.sector).max() ?? 0) * sectorSize + largest
            for piece in pieces { try read(piece, horizon: horizon, into: buffer) }
        }

        private func read(_ piece: Piece, horizon: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
            let name = extent.source.path
            let start = piece.sector * sectorSize
            let marker = try bytes(at: start, count: GrainStream.markerSize, horizon: horizon, piece.grain)
            let sector = UInt64(littleEndian: marker.loadUnaligned(as: UInt64.self))
            let size = Int(UInt32(littleEndian: marker.loadUnaligned(fromByteOffset: 8, as: UInt32.self)))
            guard sector == piece.grain * extent.header.grainSectors else {
                throw MigrationError.damaged(
                    name,
                    "the marker at byte \(start) is for sector \(sector) instead of"
                        + " \(piece.grain * extent.header.grainSectors)")
            }
            guard size > 0, size <= GrainStream.maximumCompressed(extent.header.grainSize) else {
                throw MigrationError.damaged(name, "the grain at byte \(start) claims \(size) compressed bytes")
            }
            let data = try bytes(
                at: start + UInt64(GrainStream.markerSize), count: size, horizon: horizon, piece.grain)
            let expected = Int(min(UInt64(grain.count), extent.header.capacity * sectorSize - sector * sectorSize))
            let target = UnsafeMutableRawBufferPointer(rebasing: buffer[piece.target])
            let direct = piece.skip == 0 && target.count == grain.count
            guard let count = inflater.inflate(data, into: direct ? target : grain),
                count == expected || count == grain.count
            else {
                throw MigrationError.damaged(name, "the grain at byte \(start) doesn't inflate to \(expected) bytes")
            }
            if !direct {
                target.copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: grain[Int(piece.skip)...].prefix(target.count)))
            }
        }

        /// Bytes of the extent, through the window. Valid until the next call.
        private func bytes(
            at offset: UInt64, count: Int, horizon: UInt64, _ grain: UInt64
        ) throws -> UnsafeRawBufferPointer {
            guard offset + UInt64(count) <= extent.source.length else {
                throw MigrationError.truncated(
                    extent.source.path,
                    "grain \(grain) ends at byte \(offset + UInt64(count)) of \(extent.source.length)",
                    missing: offset + UInt64(count) - extent.source.length)
            }
            if offset < windowStart || offset + UInt64(count) > windowStart + UInt64(windowCount) {
                let ahead = max(UInt64(count), min(horizon, extent.source.length) - min(offset, horizon))
                let wanted = Int(min(ahead, UInt64(window.count), extent.source.length - offset))
                windowStart = offset
                windowCount = 0
                windowCount = try file.read(
                    at: extent.source.offset + offset, into: UnsafeMutableRawBufferPointer(rebasing: window[..<wanted]))
                guard windowCount >= count else {
                    throw MigrationError.truncated(
                        extent.source.path, "it ended in grain \(grain) while being read",
                        missing: UInt64(count - windowCount))
                }
            }
            let start = Int(offset - windowStart)
            return UnsafeRawBufferPointer(rebasing: window[start..<start + count])
        }
    }
}
