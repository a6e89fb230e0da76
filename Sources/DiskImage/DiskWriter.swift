/// An image being written by many threads. Chunks arrive in any order; the image becomes valid in `finish`.
package protocol DiskWriter: Sendable {
    var format: TargetFormat { get }
    var capacity: UInt64 { get }
    var image: ImageFile { get }

    /// Writes the clusters of `chunk` whose bits are set in `bitmap` (not 0). They are on stable storage after the next
    /// `image.synchronizeData()`, not before.
    ///
    /// - Parameter buffer: `Chunk.size` bytes on a page boundary, the first `chunk.count` of them the chunk's, those
    ///   behind overwritten by this call.
    func write(
        _ chunk: Chunk, bitmap: UInt64, from buffer: UnsafeMutableRawBufferPointer
    ) throws -> ChunkPlacement

    /// Reads a chunk back as the guest would see it into the first `chunk.count` bytes of `buffer` (`Chunk.size`
    /// bytes). Returns false when the file is too short to hold it.
    func read(_ chunk: Chunk, at placement: ChunkPlacement, into buffer: UnsafeMutableRawBufferPointer) throws -> Bool

    /// Takes over chunks that an interrupted run wrote, oldest first; returns those whose place is plausible and
    /// theirs alone. None has an empty bitmap. Called once, before any other thread uses the writer.
    func adopt(_ placements: [ChunkPlacement]) throws -> [ChunkPlacement]

    /// Gives up the place of an adopted chunk whose content turned out wrong.
    func release(_ chunk: Chunk, at placement: ChunkPlacement) throws

    /// Writes the metadata for exactly these chunks, sorted by index, and syncs. All other threads are done.
    func finish(_ placements: [ChunkPlacement]) throws
}

/// Where a chunk's non-zero clusters lie in an image.
package struct ChunkPlacement: Sendable, Equatable {
    package let index: UInt64
    /// Byte of the image where the clusters begin (qcow2: packed; raw: the chunk's guest address).
    package let hostOffset: UInt64
    /// Bit i: cluster i is stored.
    package let bitmap: UInt64

    package init(index: UInt64, hostOffset: UInt64, bitmap: UInt64) {
        self.index = index
        self.hostOffset = hostOffset
        self.bitmap = bitmap
    }

    package var clusterCount: Int { bitmap.nonzeroBitCount }
}

extension TargetFormat {
    /// Opens or creates the image for writing. An existing one keeps its content, to be adopted.
    package func writer(_ path: String, capacity: UInt64) throws -> any DiskWriter {
        switch self {
        case .qcow2: try QCOW2.Writer(path, capacity: capacity)
        case .raw: try Raw.Writer(path, capacity: capacity)
        }
    }
}
