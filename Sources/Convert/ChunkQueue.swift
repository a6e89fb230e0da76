import DiskImage
import Synchronization

/// Deals out the chunks that may hold data, in ascending order, to the threads that convert them. Holes are skipped
/// by asking the source where its next data is.
final class ChunkQueue: Sendable {
    private struct State {
        let reader: any DiskReader
        /// The first chunk not yet dealt out or skipped.
        var next: UInt64 = 0
    }

    private let capacity: UInt64
    private let state: Mutex<State>

    init(_ disk: any DiskSource) throws {
        capacity = disk.capacity
        state = Mutex(State(reader: try disk.makeReader()))
    }

    /// The next chunk and the guest bytes of holes skipped before it; nil chunk at the end of the disk.
    func next() throws -> (chunk: Chunk?, skipped: UInt64) {
        try state.withLock { state in
            let from = min(state.next * UInt64(Chunk.size), capacity)
            guard from < capacity, let data = try state.reader.nextData(from: from) else {
                state.next = Chunk.total(capacity: capacity)
                return (nil, capacity - from)
            }
            let chunk = Chunk(index: data / UInt64(Chunk.size), capacity: capacity)
            state.next = chunk.index + 1
            return (chunk, chunk.offset - from)
        }
    }
}
