import Glibc
package import HostKit
import MigrationModel

extension Raw {
    /// Writes non-zero clusters at their guest address; everything else stays a hole.
    package struct Writer: DiskWriter {
        package let format = TargetFormat.raw
        package let capacity: UInt64
        package let file: File

        package init(_ path: String, capacity: UInt64) throws {
            file = try File(path, O_RDWR | O_CREAT)
            self.capacity = capacity
            try file.truncate(to: capacity)
        }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> UInt64 {
            var cluster = 0
            while cluster < Chunk.clusters {
                let first = cluster
                while cluster < Chunk.clusters, bitmap >> UInt64(cluster) & 1 == 1 { cluster += 1 }
                if cluster == first {
                    cluster += 1
                    continue
                }
                let start = first * Chunk.clusterSize
                let end = min(cluster * Chunk.clusterSize, chunk.count)
                try file.write(UnsafeRawBufferPointer(rebasing: buffer[start..<end]), at: chunk.offset + UInt64(start))
            }
            return chunk.offset
        }

        package func read(
            _ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer
        ) throws -> Bool {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count])
            return try file.read(at: chunk.offset, into: part) == chunk.count
        }

        package func adopt(_ placements: [ChunkPlacement]) -> [ChunkPlacement] {
            placements.filter { $0.hostOffset == $0.index * UInt64(Chunk.size) }
        }

        /// Overwrites the chunk with zeros: its clusters that should be holes may be what is wrong with it.
        package func release(_ chunk: Chunk, at placement: ChunkPlacement) throws {
            try file.write([UInt8](repeating: 0, count: chunk.count), at: chunk.offset)
        }

        package func finish(_ placements: [ChunkPlacement]) throws { try file.synchronize() }
    }
}
