import Glibc
import HostKit
import MigrationModel

extension Raw {
    /// Writes non-zero clusters at their guest address; everything else stays a hole.
    package struct Writer: ImageFileWriter {
        package let format = TargetFormat.raw
        package let capacity: UInt64
        let image: ImageFile

        package init(_ path: String, capacity: UInt64) throws {
            image = try ImageFile(path)
            self.capacity = capacity
            try image.file.truncate(to: capacity)
        }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> ChunkPlacement {
            let bytes = UnsafeRawBufferPointer(rebasing: buffer[..<chunk.count])
            try image.write(
                Packing.runs(of: bytes, bitmap).map { (chunk.offset + UInt64(distance(from: buffer, to: $0)), $0) })
            return ChunkPlacement(index: chunk.index, hostOffset: chunk.offset, bitmap: bitmap)
        }

        private func distance(from buffer: UnsafeMutableRawBufferPointer, to part: UnsafeRawBufferPointer) -> Int {
            guard let start = buffer.baseAddress, let place = part.baseAddress else { return 0 }
            return place - UnsafeRawPointer(start)
        }

        package func read(
            _ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer
        ) throws -> Bool {
            let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count])
            return try image.read(at: chunk.offset, into: part) == chunk.count
        }

        package func adopt(_ placement: ChunkPlacement) -> Bool {
            placement.hostOffset == placement.index * UInt64(Chunk.size)
        }

        /// Overwrites the chunk with zeros: its clusters that should be holes may be what is wrong with it.
        package func release(_ chunk: Chunk, at placement: ChunkPlacement) throws {
            try image.file.write([UInt8](repeating: 0, count: chunk.count), at: chunk.offset)
        }

        package func finish(
            _ placements: any ChunkPlacements, step: (_ done: UInt64, _ total: UInt64) throws -> Void
        ) throws { try image.file.synchronize() }
    }
}
