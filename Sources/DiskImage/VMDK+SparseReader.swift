import Glibc
import HostKit
import MigrationModel

extension VMDK {
    /// Reads a sparse extent: finds grains through the tables, inflates them if they are compressed.
    final class SparseReader: ExtentReader {
        private let extent: SparseExtent
        private let file: File
        private var tables: GrainTables
        /// For compressed extents only.
        private var stream: GrainStream?

        init(_ extent: SparseExtent, _ file: File) {
            self.extent = extent
            self.file = file
            tables = GrainTables(extent, file)
            stream = extent.header.isCompressed ? GrainStream(extent, file) : nil
        }

        private var grainSize: UInt64 { UInt64(extent.header.grainSize) }
        private var grainCount: UInt64 { (extent.capacity + grainSize - 1) / grainSize }

        func nextData(from offset: UInt64) throws -> UInt64? {
            try tables.nextStored(from: offset / grainSize, limit: grainCount).map { max(offset, $0 * grainSize) }
        }

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws -> Bool {
            let end = offset + UInt64(buffer.count)
            guard let first = try nextData(from: offset), first < end else { return false }
            zero(UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(first - offset)]))
            try read(from: first, at: offset, into: buffer, keepingHoles: false)
            return true
        }

        func overlay(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws {
            try read(from: offset, at: offset, into: buffer, keepingHoles: true)
        }

        /// - Parameter keepingHoles: what the buffer has where this extent has nothing stays.
        private func read(
            from first: UInt64, at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer, keepingHoles: Bool
        ) throws {
            let end = offset + UInt64(buffer.count)
            // Where this range's last stored grain ends bounds how far a compressed read may run ahead.
            var pieces: [Piece] = []
            var position = first
            while position < end {
                let grain = position / grainSize
                let stop = min((grain + 1) * grainSize, end)
                let piece = Piece(
                    grain: grain, skip: position - grain * grainSize,
                    target: Int(position - offset)..<Int(stop - offset))
                switch try tables.entry(grain) {
                case .hole where keepingHoles: break
                case .hole, .zero: zero(UnsafeMutableRawBufferPointer(rebasing: buffer[piece.target]))
                case .sector(let sector): pieces.append(piece.at(sector))
                }
                position = stop
            }
            if let stream { try stream.read(pieces, into: buffer) } else { try readStored(pieces, into: buffer) }
        }

        /// Uncompressed grains; neighbours in guest and file are read together.
        private func readStored(_ pieces: [Piece], into buffer: UnsafeMutableRawBufferPointer) throws {
            var index = 0
            while index < pieces.count {
                let start = pieces[index].sector * sectorSize + pieces[index].skip
                var target = pieces[index].target
                index += 1
                while index < pieces.count, pieces[index].target.lowerBound == target.upperBound,
                    pieces[index].sector * sectorSize == start + UInt64(target.count)
                {
                    target = target.lowerBound..<pieces[index].target.upperBound
                    index += 1
                }
                let grain = pieces[index - 1].grain
                guard start + UInt64(target.count) <= extent.source.length else {
                    throw MigrationError.truncated(
                        extent.source.path,
                        "grain \(grain) ends at byte \(start + UInt64(target.count)) of"
                            + " \(extent.source.length)", missing: start + UInt64(target.count) - extent.source.length)
                }
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[target])
                let got = try file.read(at: extent.source.offset + start, into: part)
                guard got == part.count else {
                    throw MigrationError.truncated(
                        extent.source.path, "it ended in grain \(grain) while being read",
                        missing: UInt64(part.count - got))
                }
            }
        }
    }

    /// The part of one stored grain that a read wants.
    struct Piece {
        let grain: UInt64
        /// Bytes of the grain before the wanted ones.
        let skip: UInt64
        /// Where they go in the reader's buffer.
        let target: Range<Int>
        var sector: UInt64 = 0

        func at(_ sector: UInt64) -> Piece {
            var piece = self
            piece.sector = sector
            return piece
        }
    }
}
