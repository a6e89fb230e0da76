import Glibc
import HostKit
import MigrationModel
import Synchronization

extension QCOW2 {
    /// Writes an image. Holds no tables while data comes in; `finish` builds them from the placements, one cluster at
    /// a time.
    package final class Writer: ImageFileWriter {
        package let format = TargetFormat.qcow2
        package let capacity: UInt64
        let image: ImageFile
        private let geometry: Geometry
        /// In units of the geometry's.
        private let allocator = Mutex(Allocator())

        package init(_ path: String, capacity: UInt64, geometry: Geometry = .standard) throws {
            try geometry.require(capacity, path: path)
            self.geometry = geometry
            image = try ImageFile(path)
            self.capacity = capacity
        }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> ChunkPlacement {
            zero(UnsafeMutableRawBufferPointer(rebasing: buffer[chunk.count...]))
            let bitmap = geometry.whole(bitmap)
            let bytes = UInt64(bitmap.nonzeroBitCount * Chunk.clusterSize)
            let offset = allocator.withLock { $0.allocate(bytes / geometry.unit) } * geometry.unit
            image.reserve(upTo: offset + bytes, step: min(reserveStep, capacity))
            try image.write(Packing.runs(of: UnsafeRawBufferPointer(buffer), bitmap), at: offset)
            return ChunkPlacement(index: chunk.index, hostOffset: offset, bitmap: bitmap)
        }

        package func read(
            _ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer
        ) throws -> Bool {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<(placement.clusterCount * Chunk.clusterSize)])
            guard try image.read(at: placement.hostOffset, into: part) == part.count else { return false }
            Packing.unpack(buffer, placement.bitmap)
            return true
        }

        package func adopt(_ placement: ChunkPlacement) throws -> Bool {
            let size = try image.file.size
            let (offset, count) = (placement.hostOffset, placement.storedBytes)
            guard offset > 0, offset % geometry.unit == 0, size >= count, offset <= size - count,
                geometry.whole(placement.bitmap) == placement.bitmap
            else { return false }
            return allocator.withLock { $0.adopt(offset / geometry.unit, count / geometry.unit) }
        }

        package func release(_ chunk: Chunk, at placement: ChunkPlacement) {
            allocator.withLock {
                $0.release(placement.hostOffset / geometry.unit, placement.storedBytes / geometry.unit)
            }
        }

        package func finish(
            _ placements: any ChunkPlacements, step: (_ done: UInt64, _ total: UInt64) throws -> Void
        ) throws {
            let end = allocator.withLock { $0.end } * geometry.unit / geometry.clusterSize
            try Tables(image.file, capacity: capacity, dataEnd: end, geometry: geometry)
                .write(placements, compression: nil, step: step)
        }
    }
}

/// The clusters of a chunk, together in the image and apart in memory.
enum Packing {
    /// The runs of neighbouring clusters in a chunk's buffer.
    static func runs(of buffer: UnsafeRawBufferPointer, _ bitmap: UInt64) -> [UnsafeRawBufferPointer] {
        var runs: [UnsafeRawBufferPointer] = []
        var cluster = 0
        while cluster < Chunk.clusters {
            let first = cluster
            while cluster < Chunk.clusters, bitmap >> UInt64(cluster) & 1 == 1 { cluster += 1 }
            if cluster == first {
                cluster += 1
            } else {
                let range = first * Chunk.clusterSize..<min(cluster * Chunk.clusterSize, buffer.count)
                runs.append(UnsafeRawBufferPointer(rebasing: buffer[range]))
            }
        }
        return runs
    }

    /// Moves clusters that lie together to their places, the zero ones between them.
    static func unpack(_ buffer: UnsafeMutableRawBufferPointer, _ bitmap: UInt64) {
        guard let base = buffer.baseAddress else { return }
        var packed = bitmap.nonzeroBitCount
        for cluster in (0..<Chunk.clusters).reversed() {
            let target = base + cluster * Chunk.clusterSize
            if bitmap >> UInt64(cluster) & 1 == 1 {
                packed -= 1
                if packed != cluster { memcpy(target, base + packed * Chunk.clusterSize, Chunk.clusterSize) }
            } else {
                memset(target, 0, Chunk.clusterSize)
            }
        }
    }
}
