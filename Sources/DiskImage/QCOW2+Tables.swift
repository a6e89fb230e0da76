import HostKit
import MigrationModel

extension QCOW2 {
    /// Writes everything but the data of an image: L2 and L1 tables, reference counts, and at the very end the header.
    struct Tables {
        private let file: File
        private let capacity: UInt64
        private let dataEnd: UInt64
        private let geometry: Geometry
        private var clusterSize: UInt64 { geometry.clusterSize }

        /// - Parameter dataEnd: the first cluster behind the data.
        init(_ file: File, capacity: UInt64, dataEnd: UInt64, geometry: Geometry = .standard) {
            self.file = file
            self.capacity = capacity
            self.dataEnd = dataEnd
            self.geometry = geometry
        }

        /// - Parameter step: told the bytes of tables written; throws to stop.
        func write(
            _ placements: any ChunkPlacements, compression: Compression?,
            step: (_ done: UInt64, _ total: UInt64) throws -> Void
        ) throws {
            let l1Entries = geometry.l1Entries(capacity)
            let l2Tables = try l2TableCount(placements) { try step(0, capacity) }
            let layout = Layout(
                dataEnd: dataEnd, l2Tables: l2Tables, l1Clusters: geometry.clusters(l1Entries * 8), geometry: geometry)
            // The old tables of a finished but unpublished image must not stay behind the new ones or in holes of L1,
            // nor space that was reserved.
            try file.truncate(to: layout.dataEnd * clusterSize)
            try file.truncate(to: layout.total * clusterSize)
            let total = (layout.total - layout.dataEnd) * clusterSize
            try writeL2AndL1(placements, layout) { try step($0, total) }
            try writeRefcounts(placements, layout) { try step($0, total) }
            try file.synchronizeData()
            let header = QCOW2.header(
                capacity: capacity, l1Entries: l1Entries, l1Offset: layout.l1 * clusterSize,
                refcountOffset: layout.refcountTable * clusterSize, refcountClusters: layout.refcountTableClusters,
                compression: compression, geometry: geometry)
            try file.write(header, at: 0)
            try file.synchronize()
        }

        private func l2TableCount(
            _ placements: any ChunkPlacements, _ step: () throws -> Void
        ) throws -> UInt64 {
            var count: UInt64 = 0
            var last: UInt64?
            try placements.forEach { placement in
                try step()
                geometry.forEachCluster(placement, capacity: capacity) { cluster, _, _ in
                    guard cluster / geometry.entriesPerL2 != last else { return }
                    count += 1
                    last = cluster / geometry.entriesPerL2
                }
            }
            return count
        }

        private func writeL2AndL1(
            _ placements: any ChunkPlacements, _ layout: Layout, _ step: (UInt64) throws -> Void
        ) throws {
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
                try step((place - layout.dataEnd) * clusterSize)
            }
            var table: UInt64?
            try placements.forEach { placement in
                try step((place - layout.dataEnd) * clusterSize)
                try geometry.forEachCluster(placement, capacity: capacity) { cluster, offset, compressed in
                    let number = cluster / geometry.entriesPerL2
                    if let table, table != number { try flush(table: table) }
                    table = number
                    let entry = compressed.map { QCOW2.compressedEntry(offset, $0) } ?? (offset | copied)
                    l2.storeBigEndian(entry, at: Int(cluster % geometry.entriesPerL2) * 8)
                }
            }
            if let table { try flush(table: table) }
            if let l1Page { try file.write(l1, at: (layout.l1 + l1Page) * clusterSize) }
        }

        private func writeRefcounts(
            _ placements: any ChunkPlacements, _ layout: Layout, _ step: (UInt64) throws -> Void
        ) throws {
            var refcounts = Refcounts(file, start: layout.refcountBlocks, geometry: geometry)
            try refcounts.add(0..<1)
            try placements.forEach { placement in
                try step((layout.refcountBlocks - layout.dataEnd + refcounts.writtenBlocks) * clusterSize)
                try geometry.forEachCluster(placement, capacity: capacity) { _, offset, compressed in
                    // A reader fetches whole sectors.
                    let last = compressed.map { (offset + UInt64($0) - 1) | 511 } ?? (offset + clusterSize - 1)
                    try refcounts.add(offset / clusterSize..<last / clusterSize + 1)
                }
            }
            try refcounts.add(layout.dataEnd..<layout.total)
            try refcounts.finish()
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

        init(dataEnd: UInt64, l2Tables: UInt64, l1Clusters: UInt64, geometry: Geometry = .standard) {
            self.dataEnd = dataEnd
            l2 = dataEnd
            l1 = l2 + l2Tables
            refcountBlocks = l1 + l1Clusters
            // The blocks count themselves and their table, so look for the fixed point from below.
            var blocks: UInt64 = 1
            var table: UInt64 = 1
            while true {
                let total = refcountBlocks + blocks + table
                let needed = (total + geometry.countsPerRefcountBlock - 1) / geometry.countsPerRefcountBlock
                let neededTable = geometry.clusters(needed * 8)
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

extension ChunkPlacement {
    /// Calls `body` with each stored cluster's number in the chunk, its byte in the image, and its compressed size.
    func forEachCluster(
        _ body: (_ cluster: Int, _ offset: UInt64, _ compressed: Int?) throws -> Void
    ) rethrows {
        var offset = hostOffset
        var index = 0
        for cluster in 0..<Chunk.clusters where bitmap >> UInt64(cluster) & 1 == 1 {
            let size = sizes.isEmpty ? nil : Int(sizes[index]) * 2
            try body(cluster, offset, size)
            offset += UInt64(size ?? Chunk.clusterSize)
            index += 1
        }
    }
}
