import Glibc
import HostKit
import MigrationModel
import Synchronization

extension QCOW2 {
    /// Writes an image of compressed clusters. Each thread compresses the clusters of its chunk and writes them as one
    /// piece, byte next to byte; pieces begin at multiples of 4 KiB so that they can be written directly. Clusters of
    /// neighbouring pieces share host clusters, whose reference counts say so.
    package final class CompressedWriter: ImageFileWriter {
        package let format = TargetFormat.qcow2
        package let capacity: UInt64
        let image: ImageFile
        private let compression: Compression
        /// In units of `ImageFile.alignment`.
        private let allocator = Mutex(Allocator(end: clusterSize / unit))
        private let codecs = Mutex<[ClusterCodec]>([])

        private static let unit = UInt64(ImageFile.alignment)

        package init(_ path: String, capacity: UInt64, compression: Compression) throws {
            image = try ImageFile(path)
            self.capacity = capacity
            self.compression = compression
        }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> ChunkPlacement {
            zero(UnsafeMutableRawBufferPointer(rebasing: buffer[chunk.count...]))
            let codec = takeCodec()
            defer { put(codec) }
            var sizes: [UInt16] = []
            var end = 0
            for cluster in 0..<Chunk.clusters where bitmap >> UInt64(cluster) & 1 == 1 {
                let start = cluster * Chunk.clusterSize
                let input = UnsafeRawBufferPointer(rebasing: buffer[start..<start + Chunk.clusterSize])
                let output = UnsafeMutableRawBufferPointer(rebasing: codec.room[end..<end + ClusterCodec.bound])
                let count = try codec.compress(input, into: output)
                if count % 2 == 1 { codec.room[end + count] = 0 }
                sizes.append(UInt16((count + 1) / 2))
                end += (count + 1) / 2 * 2
            }
            let units = (end + ImageFile.alignment - 1) / ImageFile.alignment
            zero(UnsafeMutableRawBufferPointer(rebasing: codec.room[end..<units * ImageFile.alignment]))
            let offset = allocator.withLock { $0.allocate(UInt64(units)) } * Self.unit
            image.reserve(upTo: offset + UInt64(units) * Self.unit, step: min(reserveStep, capacity))
            try image.write(
                UnsafeRawBufferPointer(rebasing: codec.room[..<(units * ImageFile.alignment)]), at: offset)
            return ChunkPlacement(index: chunk.index, hostOffset: offset, bitmap: bitmap, sizes: sizes)
        }

        package func read(
            _ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer
        ) throws -> Bool {
            let codec = takeCodec()
            defer { put(codec) }
            let count = Int(placement.units * Self.unit)
            let part = UnsafeMutableRawBufferPointer(rebasing: codec.room[..<count])
            guard try image.read(at: placement.hostOffset, into: part) == count else { return false }
            zero(buffer)
            var start = 0
            var index = 0
            for cluster in 0..<Chunk.clusters where placement.bitmap >> UInt64(cluster) & 1 == 1 {
                let size = Int(placement.sizes[index]) * 2
                let target = cluster * Chunk.clusterSize
                guard
                    codec.decompress(
                        UnsafeRawBufferPointer(rebasing: codec.room[start..<start + size]),
                        into: UnsafeMutableRawBufferPointer(
                            rebasing: buffer[target..<target + Chunk.clusterSize]))
                else { return false }
                start += size
                index += 1
            }
            return true
        }

        package func adopt(_ placement: ChunkPlacement) throws -> Bool {
            let size = try image.file.size
            let (offset, count) = (placement.hostOffset, placement.units * Self.unit)
            guard placement.sizes.count == placement.clusterCount,
                placement.sizes.allSatisfy({ Int($0) * 2 <= ClusterCodec.bound + 1 }),
                offset >= clusterSize, offset % Self.unit == 0, size >= count, offset <= size - count
            else { return false }
            return allocator.withLock { $0.adopt(offset / Self.unit, placement.units) }
        }

        package func release(_ chunk: Chunk, at placement: ChunkPlacement) {
            allocator.withLock { $0.release(placement.hostOffset / Self.unit, placement.units) }
        }

        package func finish(
            _ placements: any ChunkPlacements, step: (_ done: UInt64, _ total: UInt64) throws -> Void
        ) throws {
            let end = allocator.withLock { $0.end } * Self.unit
            try Tables(image.file, capacity: capacity, dataEnd: (end + clusterSize - 1) / clusterSize)
                .write(placements, compression: compression, step: step)
        }

        private func takeCodec() -> ClusterCodec {
            codecs.withLock { $0.popLast() } ?? ClusterCodec(compression)
        }

        private func put(_ codec: ClusterCodec) { codecs.withLock { $0.append(codec) } }
    }
}
