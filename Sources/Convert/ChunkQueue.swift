import DiskImage
import Synchronization

/// Finds the next chunk with data by asking the source, from its tables or the file system's extent map.
final class ChunkQueue: ChunkFeed {
    private struct State {
        let reader: any DiskReader
        /// The first chunk not yet dealt out or skipped.
        var next: UInt64
        var ticket: UInt64
    }

    private let capacity: UInt64
    private let hasher: SourceHasher?
    private let state: Mutex<State>

    /// - Parameter hasher: nil when another feed reads the source.
    init(_ disk: any DiskSource, _ hasher: SourceHasher?, from first: UInt64 = 0, ticket: UInt64 = 0) throws {
        capacity = disk.capacity
        self.hasher = hasher
        state = Mutex(State(reader: try disk.makeReader(), next: first, ticket: ticket))
    }

    func next(while goesOn: () throws -> Bool) throws -> ChunkWork {
        try state.withLock { state in
            let from = min(state.next * UInt64(Chunk.size), capacity)
            guard from < capacity, let data = try state.reader.nextData(from: from) else {
                state.next = Chunk.total(capacity: capacity)
                return ChunkWork(skipped: capacity - from)
            }
            let chunk = Chunk(index: data / UInt64(Chunk.size), capacity: capacity)
            state.next = chunk.index + 1
            defer { state.ticket += 1 }
            return ChunkWork(
                ticket: state.ticket, chunk: chunk, skipped: max(chunk.offset, from) - from)
        }
    }

    func readSource(while goesOn: () throws -> Bool) throws -> SourceSummary? {
        struct Halted: Error {}
        guard let hasher else { return nil }
        guard hasher.isWorthwhile else { return SourceSummary(bytes: hasher.length, sha256: nil) }
        do {
            let digest = try hasher.run { if !(try goesOn()) { throw Halted() } }
            return SourceSummary(bytes: hasher.length, sha256: digest)
        } catch is Halted { return nil }
    }
}
