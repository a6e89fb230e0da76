import Glibc
import HostKit
import MigrationModel
import Synchronization

extension QCOW2 {
    /// Writes an image. Holds no tables while data comes in; `finish` builds them from the placements, one cluster at
    /// a time.
    package final class Writer: DiskWriter {
        package let format = TargetFormat.qcow2
        package let capacity: UInt64
        package let image: ImageFile
        private let allocator = Mutex(Allocator())

        package init(_ path: String, capacity: UInt64) throws {
            image = try ImageFile(path)
            self.capacity = capacity
        }

        private var file: File { image.file }

        package func write(
            _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
        ) throws -> ChunkPlacement {
            zero(UnsafeMutableRawBufferPointer(rebasing: buffer[chunk.count...]))
            let count = UInt64(bitmap.nonzeroBitCount)
            let offset = allocator.withLock { $0.allocate(count) } * clusterSize
            image.reserve(upTo: offset + count * clusterSize, step: min(reserveStep, capacity))
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

        package func adopt(_ placements: [ChunkPlacement]) throws -> [ChunkPlacement] {
            let size = try file.size
            let plausible = placements.filter {
                let count = UInt64($0.clusterCount) * clusterSize
                return $0.hostOffset > 0 && $0.hostOffset % clusterSize == 0 && size >= count
                    && $0.hostOffset <= size - count
            }
            let runs = plausible.map { (start: $0.hostOffset / clusterSize, count: UInt64($0.clusterCount)) }
            return allocator.withLock { $0.adopt(runs) }.map { plausible[$0] }
        }

        package func release(_ chunk: Chunk, at placement: ChunkPlacement) {
            allocator.withLock { $0.release(placement.hostOffset / clusterSize, UInt64(placement.clusterCount)) }
        }

        package func finish(_ placements: [ChunkPlacement]) throws {
            let l1Entries = max(1, (capacity + clusterSize * entriesPerL2 - 1) / (clusterSize * entriesPerL2))
            let layout = Layout(
                dataEnd: allocator.withLock { $0.end },
                l2Tables: l2TableCount(placements), l1Clusters: (l1Entries * 8 + clusterSize - 1) / clusterSize)
            // The old tables of a finished but unpublished image must not stay behind the new ones or in holes of L1.
            try file.truncate(to: layout.dataEnd * clusterSize)
            try file.truncate(to: layout.total * clusterSize)
            try writeL2AndL1(placements, layout)
            try writeRefcounts(placements, layout)
            try file.synchronizeData()
            let header = QCOW2.header(
                capacity: capacity, l1Entries: l1Entries, l1Offset: layout.l1 * clusterSize,
                refcountOffset: layout.refcountTable * clusterSize, refcountClusters: layout.refcountTableClusters)
            try file.write(header, at: 0)
            try file.synchronize()
        }

        private func l2TableCount(_ placements: [ChunkPlacement]) -> UInt64 {
            var count: UInt64 = 0
            var last: UInt64?
            for placement in placements where placement.bitmap != 0 && placement.index / chunksPerL2 != last {
                count += 1
                last = placement.index / chunksPerL2
            }
            return count
        }

        private func writeL2AndL1(_ placements: [ChunkPlacement], _ layout: Layout) throws {
            var place = layout.l2
            var l2 = [UInt8](repeating: 0, count: Int(clusterSize))
            var l1 = l2
            var l1Page: UInt64?
            func flush(table: UInt64) throws {
                try file.write(l2, at: place * clusterSize)
                let page = table * 8 / clusterSize
                if let l1Page, l1Page != page {
                    try file.write(l1, at: (layout.l1 + l1Page) * clusterSize)
                    l1 = [UInt8](repeating: 0, count: Int(clusterSize))
                }
                l1Page = page
                l1.storeBigEndian(place * clusterSize | copied, at: Int(table * 8 % clusterSize))
                l2 = [UInt8](repeating: 0, count: Int(clusterSize))
                place += 1
            }
            var table: UInt64?
            for placement in placements where placement.bitmap != 0 {
                if let table, table != placement.index / chunksPerL2 { try flush(table: table) }
                table = placement.index / chunksPerL2
                var host = placement.hostOffset
                let first = Int(placement.index % chunksPerL2) * Chunk.clusters
                for cluster in 0..<Chunk.clusters where placement.bitmap >> UInt64(cluster) & 1 == 1 {
                    l2.storeBigEndian(host | copied, at: (first + cluster) * 8)
                    host += clusterSize
                }
            }
            if let table { try flush(table: table) }
            if let l1Page { try file.write(l1, at: (layout.l1 + l1Page) * clusterSize) }
        }

        private func writeRefcounts(_ placements: [ChunkPlacement], _ layout: Layout) throws {
            var used = placements.filter { $0.bitmap != 0 }.map {
                $0.hostOffset / clusterSize..<$0.hostOffset / clusterSize + UInt64($0.clusterCount)
            }
            used += [0..<1, layout.dataEnd..<layout.total]
            used.sort { $0.lowerBound < $1.lowerBound }
            var next = 0
            for block in 0..<layout.refcountBlockCount {
                let covered = block * countsPerRefcountBlock..<(block + 1) * countsPerRefcountBlock
                var counts = [UInt16](repeating: 0, count: Int(countsPerRefcountBlock))
                while next < used.count, used[next].lowerBound < covered.upperBound {
                    for cluster in used[next].clamped(to: covered) {
                        counts[Int(cluster - covered.lowerBound)] = UInt16(1).bigEndian
                    }
                    if used[next].upperBound > covered.upperBound { break }
                    next += 1
                }
                try counts.withUnsafeBytes { try file.write($0, at: (layout.refcountBlocks + block) * clusterSize) }
            }
            var table = [UInt8](repeating: 0, count: Int(layout.refcountTableClusters * clusterSize))
            for block in 0..<layout.refcountBlockCount {
                table.storeBigEndian((layout.refcountBlocks + block) * clusterSize, at: Int(block * 8))
            }
            try file.write(table, at: layout.refcountTable * clusterSize)
        }
    }

    /// Where the metadata goes, in clusters.
    struct Layout {
        let dataEnd: UInt64
        let l2: UInt64
        let l1: UInt64
        let refcountBlocks: UInt64
        let refcountBlockCount: UInt64
        let refcountTable: UInt64
        let refcountTableClusters: UInt64
        let total: UInt64

        init(dataEnd: UInt64, l2Tables: UInt64, l1Clusters: UInt64) {
            self.dataEnd = dataEnd
            l2 = dataEnd
            l1 = l2 + l2Tables
            refcountBlocks = l1 + l1Clusters
            // The blocks count themselves and their table, so look for the fixed point from below.
            var blocks: UInt64 = 1
            var table: UInt64 = 1
            while true {
                let total = refcountBlocks + blocks + table
                let needed = (total + countsPerRefcountBlock - 1) / countsPerRefcountBlock
                let neededTable = (needed * 8 + clusterSize - 1) / clusterSize
                if needed <= blocks, neededTable <= table { break }
                blocks = max(blocks, needed)
                table = max(table, neededTable)
            }
            refcountBlockCount = blocks
            refcountTableClusters = table
            refcountTable = refcountBlocks + blocks
            total = refcountTable + table
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
