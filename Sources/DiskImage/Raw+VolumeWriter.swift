import Glibc
import HostKit
import MigrationModel
import Synchronization

extension Raw {
    /// Writes a disk over a volume. What the volume held shows through until `finish`, which zeroes every cluster that
    /// wasn't written, the rest behind the disk included.
    ///
    /// The first chunk stays away from the volume: an interrupted image must not look like a disk that boots. `finish`
    /// leaves it in a file, and whoever publishes the image copies it.
    package final class VolumeWriter: DiskWriter {
        package let format = TargetFormat.raw
        package let capacity: UInt64
        private let volume: any Volume
        private let headPath: String
        private let head = Mutex<[UInt8]?>(nil)

        /// - Parameter headPath: the file for the first chunk.
        package init(_ volume: any Volume, capacity: UInt64, headPath: String) {
            self.volume = volume
            self.capacity = capacity
            self.headPath = headPath
        }

        package var isDirect: Bool { volume.isDirect }
        package var identity: FileIdentity { get throws { try FileIdentity(path: headPath) } }
        package func synchronizeData() throws { try volume.flush() }

        /// Bytes of the volume that the chunk's clusters may take: whole blocks.
        private func room(_ chunk: Chunk) -> Int {
            (chunk.count + volume.blockSize - 1) / volume.blockSize * volume.blockSize
        }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> ChunkPlacement {
            if chunk.index == 0 {
                head.withLock { $0 = Array(buffer[..<chunk.count]) }
            } else {
                let room = room(chunk)
                zero(UnsafeMutableRawBufferPointer(rebasing: buffer[chunk.count..<room]))
                try forEachRun(UnsafeMutableRawBufferPointer(rebasing: buffer[..<room]), bitmap) {
                    try volume.write(UnsafeRawBufferPointer($1), at: chunk.offset + $0)
                }
            }
            return ChunkPlacement(index: chunk.index, hostOffset: chunk.offset, bitmap: bitmap)
        }

        package func read(
            _ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer
        ) throws -> Bool {
            zero(buffer)
            try forEachRun(UnsafeMutableRawBufferPointer(rebasing: buffer[..<room(chunk)]), placement.bitmap) {
                try volume.read(at: chunk.offset + $0, into: $1)
            }
            return true
        }

        private func forEachRun(
            _ buffer: UnsafeMutableRawBufferPointer, _ bitmap: UInt64,
            _ body: (UInt64, UnsafeMutableRawBufferPointer) throws -> Void
        ) throws {
            for run in Packing.runs(of: UnsafeRawBufferPointer(buffer), bitmap) {
                guard let start = buffer.baseAddress, let place = run.baseAddress else { continue }
                let offset = place - UnsafeRawPointer(start)
                try body(
                    UInt64(offset), UnsafeMutableRawBufferPointer(rebasing: buffer[offset..<offset + run.count]))
            }
        }

        /// All but the first chunk, which only the process that made it has.
        package func adopt(_ placement: ChunkPlacement) -> Bool {
            placement.index > 0 && placement.hostOffset == placement.index * UInt64(Chunk.size)
        }

        package func release(_ chunk: Chunk, at placement: ChunkPlacement) {}

        package func finish(
            _ placements: any ChunkPlacements, step: (_ done: UInt64, _ total: UInt64) throws -> Void
        ) throws {
            var total: UInt64 = 0
            try forEachHole(placements) {
                total += UInt64($0.count)
                try step(0, volume.size)
            }
            var done: UInt64 = 0
            var zeroing = Zeroing()
            try forEachHole(placements) {
                try zeroing.zero(volume, $0) {
                    done += $0
                    try step(done, total)
                }
            }
            try volume.flush()
            let zeros = [UInt8](repeating: 0, count: Chunk(index: 0, capacity: capacity).count)
            try Files.writeAtomically(head.withLock { $0 } ?? zeros, to: headPath)
        }

        /// Goes through what no chunk covers, from the second on to the volume's end, in ascending order.
        private func forEachHole(
            _ placements: any ChunkPlacements, _ body: (Range<UInt64>) throws -> Void
        ) throws {
            var position = min(UInt64(Chunk.size), volume.size)
            func data(_ start: UInt64, _ end: UInt64) throws {
                if start > position { try body(position..<start) }
                position = max(position, end)
            }
            try placements.forEach { placement in
                guard placement.index > 0 else { return }
                let chunk = Chunk(index: placement.index, capacity: capacity)
                for cluster in 0..<Chunk.clusters where placement.bitmap >> UInt64(cluster) & 1 == 1 {
                    let start = cluster * Chunk.clusterSize
                    let end = min(start + Chunk.clusterSize, room(chunk))
                    try data(chunk.offset + UInt64(start), chunk.offset + UInt64(end))
                }
            }
            try data(volume.size, volume.size)
        }
    }
}
