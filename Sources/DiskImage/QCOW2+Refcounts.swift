import HostKit

extension QCOW2 {
    /// Counts references to host clusters, in whatever order they come, and writes the blocks that hold the counts. A
    /// few blocks are in memory, each for 2 GiB of an image of the usual clusters: clusters come nearly in the order they
    /// lie, so hardly any block is read back.
    struct Refcounts {
        private static let capacity = 8

        private let file: File
        /// Cluster where block 0 goes.
        private let start: UInt64
        private let geometry: Geometry
        private var clusterSize: UInt64 { geometry.clusterSize }
        /// The blocks in memory, the last used at the end.
        private var blocks: [(number: UInt64, counts: [UInt16])] = []
        /// Those that were written and dropped.
        private var written: Set<UInt64> = []
        /// How many those are.
        var writtenBlocks: UInt64 { UInt64(written.count) }

        /// - Parameter start: the cluster of the first block; blocks never written read as zeros.
        init(_ file: File, start: UInt64, geometry: Geometry = .standard) {
            self.file = file
            self.start = start
            self.geometry = geometry
        }

        /// Adds one reference to each cluster of `range`.
        mutating func add(_ range: Range<UInt64>) throws {
            for cluster in range {
                let number = cluster / geometry.countsPerRefcountBlock
                if blocks.last?.number != number { try load(number) }
                blocks[blocks.count - 1].counts[Int(cluster % geometry.countsPerRefcountBlock)] += 1
            }
        }

        /// Writes what is in memory.
        mutating func finish() throws {
            for block in blocks { try write(block) }
            blocks = []
        }

        private mutating func load(_ number: UInt64) throws {
            if let place = blocks.firstIndex(where: { $0.number == number }) {
                blocks.append(blocks.remove(at: place))
                return
            }
            if blocks.count == Self.capacity {
                let oldest = blocks.removeFirst()
                try write(oldest)
                written.insert(oldest.number)
            }
            var counts = [UInt16](repeating: 0, count: Int(geometry.countsPerRefcountBlock))
            if written.contains(number) {
                let bytes = try file.readExactly(at: (start + number) * clusterSize, count: Int(clusterSize))
                for index in counts.indices {
                    counts[index] = UInt16(bytes[2 * index]) << 8 | UInt16(bytes[2 * index + 1])
                }
            }
            blocks.append((number, counts))
        }

        private func write(_ block: (number: UInt64, counts: [UInt16])) throws {
            let counts = block.counts.map(\.bigEndian)
            try counts.withUnsafeBytes { try file.write($0, at: (start + block.number) * clusterSize) }
        }
    }
}
