import MigrationModel

/// The compressed grains of one chunk, as they came from a stream, with the memory they lie in. Filled by the thread
/// that reads, emptied by one that inflates: whoever holds the only reference owns it, so it is `@unchecked Sendable`
/// like a C buffer that is handed over.
package final class GrainBlock: @unchecked Sendable {
    struct Grain {
        /// Its first guest byte, counted from the chunk's.
        let offset: Int
        /// Its zlib stream in `memory`.
        let data: Range<Int>
    }

    let memory: UnsafeMutableRawBufferPointer
    /// The chunk it belongs to.
    package internal(set) var index: UInt64 = 0
    var grains: [Grain] = []
    let grainSize: Int
    private let name: String

    /// - Parameter name: the stream's, for messages.
    init(capacity: Int, grainSize: Int, name: String) {
        memory = .allocate(byteCount: capacity, alignment: 4096)
        self.grainSize = grainSize
        self.name = name
    }

    func damaged(_ offset: UInt64, _ count: Int) -> MigrationError {
        .damaged(name, "the grain for guest byte \(offset) doesn't inflate to \(count) bytes")
    }

    deinit { memory.deallocate() }
}

/// Inflates the grains of a chunk. One thread at a time.
package final class GrainInflater {
    private let inflater = Inflater()

    package init() {}

    /// Fills the chunk's bytes in `buffer`, zeros where there is no grain.
    ///
    /// - Parameter filled: called as the chunk grows, with the count of its bytes that are final: they are still in
    ///   the CPU's cache.
    package func inflate(
        _ block: GrainBlock, _ chunk: Chunk, into buffer: UnsafeMutableRawBufferPointer, filled: (Int) -> Void
    ) throws {
        var done = 0
        for grain in block.grains {
            zero(UnsafeMutableRawBufferPointer(rebasing: buffer[done..<grain.offset]))
            let target = UnsafeMutableRawBufferPointer(
                rebasing: buffer[grain.offset..<min(grain.offset + block.grainSize, Chunk.size)])
            let wanted = min(target.count, chunk.count - grain.offset)
            let data = UnsafeRawBufferPointer(rebasing: block.memory[grain.data])
            guard let count = inflater.inflate(data, into: target), count == wanted || count == target.count else {
                throw block.damaged(chunk.offset + UInt64(grain.offset), wanted)
            }
            done = grain.offset + wanted
            filled(done)
        }
        zero(UnsafeMutableRawBufferPointer(rebasing: buffer[done..<chunk.count]))
        filled(chunk.count)
    }
}
