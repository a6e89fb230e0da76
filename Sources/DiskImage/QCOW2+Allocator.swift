extension QCOW2 {
    /// Hands out units of the image, clusters or parts of them: behind the last one in use, or from gaps that an interrupted run left.
    struct Allocator {
        /// First unit behind everything in use. The header's come first.
        private(set) var end: UInt64
        /// Free runs before `end`.
        private var gaps: [(start: UInt64, count: UInt64)] = []

        init(end: UInt64 = 1) { self.end = end }

        mutating func allocate(_ count: UInt64) -> UInt64 {
            if let index = gaps.firstIndex(where: { $0.count >= count }) {
                let start = gaps[index].start
                gaps[index] = (start + count, gaps[index].count - count)
                if gaps[index].count == 0 { gaps.remove(at: index) }
                return start
            }
            defer { end += count }
            return end
        }

        mutating func release(_ start: UInt64, _ count: UInt64) { gaps.append((start, count)) }

        /// Takes over runs of units, oldest first, and returns the indices of those accepted: of two that overlap
        /// the newer one, which was written over the older.
        mutating func adopt(_ runs: [(start: UInt64, count: UInt64)]) -> [Int] {
            var kept: [Int] = []
            for index in runs.indices.sorted(by: { runs[$0].start < runs[$1].start }) {
                if let last = kept.last, runs[index].start < runs[last].start + runs[last].count {
                    if index > last { kept[kept.count - 1] = index }
                } else {
                    kept.append(index)
                }
            }
            for index in kept {
                if runs[index].start > end { gaps.append((end, runs[index].start - end)) }
                end = runs[index].start + runs[index].count
            }
            return kept
        }
    }
}
