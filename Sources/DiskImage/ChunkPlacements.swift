/// The chunks an image holds, kept wherever they fit: those of a large disk don't in memory.
package protocol ChunkPlacements {
    /// Calls `body` with each, in ascending order of their indices; none has an empty bitmap.
    func forEach(_ body: (ChunkPlacement) throws -> Void) throws
}
