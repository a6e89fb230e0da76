import DiskImage
import HostKit

/// Deals out the chunks that may hold data, in ascending order, to the threads that convert them.
protocol ChunkFeed: Sendable {
    /// Blocks until there is a chunk. `chunk` is nil at the end of the disk, for every thread that asks.
    ///
    /// - Parameter goesOn: asked while waiting; the feed is over when it returns false.
    func next(while goesOn: () throws -> Bool) throws -> ChunkWork
    /// Takes a block back once its grains are inflated.
    func recycle(_ block: GrainBlock)
    /// Run by one thread while others call `next`: reads what must be read in order. Returns nil when it ended early.
    func readSource(while goesOn: () throws -> Bool) throws -> SourceSummary?
}

/// What is known of a source stream once it was read to its end.
struct SourceSummary: Sendable {
    let bytes: UInt64
    /// nil when it wasn't computed.
    let sha256: [UInt8]?
}

extension ChunkFeed {
    func recycle(_ block: GrainBlock) {}
}

struct ChunkWork {
    /// 0, 1, 2 … in the order chunks were dealt out.
    var ticket: UInt64 = 0
    var chunk: Chunk?
    /// Guest bytes of holes before the chunk, or before the end.
    var skipped: UInt64 = 0
    /// The chunk's grains, where they were read already.
    var block: GrainBlock?
}
