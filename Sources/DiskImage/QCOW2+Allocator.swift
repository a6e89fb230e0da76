extension QCOW2 {
    /// Hands out units of the image, clusters or parts of them: from gaps that an interrupted run left, or behind
    /// everything in use. As large as there are gaps, not as there are chunks.
    struct Allocator {
        /// Runs in use, ascending; they neither overlap nor touch. The header's come first.
        private var used: [Range<UInt64>]

        init(end: UInt64 = 1) { used = [0..<end] }

        /// First unit behind everything in use.
        var end: UInt64 { used.last?.upperBound ?? 0 }

        mutating func allocate(_ count: UInt64) -> UInt64 {
            let gap = used.indices.dropLast().first { used[$0 + 1].lowerBound - used[$0].upperBound >= count }
            let start = gap.map { used[$0].upperBound } ?? end
            _ = adopt(start, count)
            return start
        }

        /// Takes a run. Returns false when part of it is in use.
        mutating func adopt(_ start: UInt64, _ count: UInt64) -> Bool {
            var run = start..<start + count
            // The first run that begins behind this one's start.
            var place = partition { $0.lowerBound >= run.lowerBound }
            guard place == 0 || used[place - 1].upperBound <= run.lowerBound,
                place == used.count || used[place].lowerBound >= run.upperBound
            else { return false }
            if place < used.count, used[place].lowerBound == run.upperBound {
                run = run.lowerBound..<used.remove(at: place).upperBound
            }
            if place > 0, used[place - 1].upperBound == run.lowerBound {
                place -= 1
                run = used.remove(at: place).lowerBound..<run.upperBound
            }
            used.insert(run, at: place)
            return true
        }

        /// Gives back a run that is in use as a whole.
        mutating func release(_ start: UInt64, _ count: UInt64) {
            let place = partition { $0.upperBound > start }
            guard place < used.count, count > 0 else { return }
            let run = used[place]
            used.replaceSubrange(
                place...place, with: [run.lowerBound..<start, start + count..<run.upperBound].filter { !$0.isEmpty })
        }

        /// The first index from which on `isBehind` holds.
        private func partition(_ isBehind: (Range<UInt64>) -> Bool) -> Int {
            var (low, high) = (0, used.count)
            while low < high {
                let middle = (low + high) / 2
                if isBehind(used[middle]) { high = middle } else { low = middle + 1 }
            }
            return low
        }
    }
}
