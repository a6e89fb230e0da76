import MigrationModel

extension QCOW2 {
    /// What follows from an image's cluster size. Data is stored in runs of 64 KiB, the unit of a chunk's bitmap:
    /// smaller clusters are stored sixteen, say, at a time, larger ones as soon as one of their 64 KiB isn't zero.
    package struct Geometry: Sendable, Equatable {
        package static let standard = Geometry(unchecked: UInt64(Chunk.clusterSize))
        /// QEMU opens no image with more.
        private static let largestL1: UInt64 = 32 << 20
        private static let largestRefcountTable: UInt64 = 8 << 20

        /// Bytes, a power of two.
        package let clusterSize: UInt64

        private init(unchecked clusterSize: UInt64) { self.clusterSize = clusterSize }

        /// Throws `invalidArgument` unless it is a power of two from 512 B to 2 MiB, as in QEMU.
        package init(clusterSize: UInt64) throws {
            guard (512...2 << 20).contains(clusterSize), clusterSize.nonzeroBitCount == 1 else {
                throw MigrationError(
                    .invalidArgument, "clusters can't have \(clusterSize) bytes",
                    hint: "choose a power of two from 512 to 2M; 64K is the usual one")
            }
            self.init(unchecked: clusterSize)
        }

        var clusterBits: UInt32 { UInt32(clusterSize.trailingZeroBitCount) }
        var entriesPerL2: UInt64 { clusterSize / 8 }
        /// Of 16 bits each.
        var countsPerRefcountBlock: UInt64 { clusterSize / 2 }
        /// Data is allocated in multiples of this many bytes.
        var unit: UInt64 { max(clusterSize, UInt64(Chunk.clusterSize)) }

        func clusters(_ bytes: UInt64) -> UInt64 { (bytes + clusterSize - 1) / clusterSize }
        func l1Entries(_ capacity: UInt64) -> UInt64 {
            max(1, (clusters(capacity) + entriesPerL2 - 1) / entriesPerL2)
        }

        /// Throws `invalidArgument` when QEMU would refuse an image of this capacity for its tables' size.
        func require(_ capacity: UInt64, path: String) throws {
            let l1 = l1Entries(capacity)
            let full = Layout(
                dataEnd: clusters(capacity + 2 * UInt64(Chunk.size)), l2Tables: l1, l1Clusters: clusters(l1 * 8),
                geometry: self)
            guard l1 * 8 <= Self.largestL1, full.refcountTableClusters * clusterSize <= Self.largestRefcountTable else {
                throw MigrationError(
                    .invalidArgument, "\(path): \(capacity) bytes are too much for clusters of \(clusterSize)",
                    hint: "choose larger clusters: --cluster-size")
            }
        }

        /// The bitmap of what is stored when the clusters that hold `bitmap` are, whole.
        func whole(_ bitmap: UInt64) -> UInt64 {
            let count = Int(clusterSize) / Chunk.clusterSize
            guard count > 1 else { return bitmap }
            let group = (1 << UInt64(count)) - 1 as UInt64
            var result: UInt64 = 0
            for start in stride(from: 0, to: Chunk.clusters, by: count) where bitmap >> UInt64(start) & group != 0 {
                result |= group << UInt64(start)
            }
            return result
        }

        /// Calls `body` with each stored cluster's number on the disk, its byte in the image, and its compressed size.
        func forEachCluster(
            _ placement: ChunkPlacement, capacity: UInt64,
            _ body: (_ cluster: UInt64, _ offset: UInt64, _ compressed: Int?) throws -> Void
        ) rethrows {
            let parts = UInt64(Chunk.clusterSize) / min(clusterSize, UInt64(Chunk.clusterSize))
            try placement.forEachCluster { part, offset, compressed in
                let guest = placement.index * UInt64(Chunk.size) + UInt64(part * Chunk.clusterSize)
                guard guest % clusterSize == 0 || parts > 1 else { return }
                for number in 0..<parts where guest + number * clusterSize < capacity {
                    try body(guest / clusterSize + number, offset + number * clusterSize, compressed)
                }
            }
        }
    }
}
