import DiskImage
import HostKit
import Synchronization

/// Chunks of a disk that is read front to back by one thread, which runs `read`. That thread's reads are large and in
/// order, and each byte is digested while it is in the CPU's cache: the source is read once.
final class ForwardFeed: ChunkFeed {
    private struct State {
        /// Blocks with grains, in order.
        var ready: [GrainBlock] = []
        var free: [GrainBlock] = []
        var isOver = false
        /// Takes over where the stream turned out not to be in guest order.
        var fallback: ChunkQueue?
        var ticket: UInt64 = 0
        /// Guest bytes dealt out or skipped.
        var position: UInt64 = 0
    }

    /// Held by the thread that reads for as long as it does.
    private let reading: Mutex<(stream: VMDK.ForwardReader, source: WatchedSource)>
    /// nil for a pipe.
    private let disk: (any DiskSource)?
    private let state = Mutex(State())
    private let readyCount = MonotonicSemaphore()
    private let freeCount: MonotonicSemaphore
    let capacity: UInt64

    /// Reads the beginning of the stream.
    ///
    /// - Parameters:
    ///   - disk: what the bytes are those of; nil for a pipe.
    ///   - blocks: how many chunks are held at most, waiting or being inflated.
    /// - Returns: nil when the disk isn't laid out front to back.
    init?(
        _ source: sending any ByteSource, disk: (any DiskSource)?, options: DiskConversion.Options, blocks: Int,
        stop: StopFlag
    ) throws {
        let watched = WatchedSource(
            source,
            StreamDigests(
                name: source.name, wanted: options.checksum == .sha256, expected: options.expectedDigests),
            options.rateLimit, stop)
        let stream: VMDK.ForwardReader
        if let disk {
            guard let found = try disk.makeForwardReader(watched) else { return nil }
            stream = found
        } else {
            stream = try VMDK.ForwardReader(watched)
        }
        self.disk = disk
        capacity = stream.capacity
        freeCount = MonotonicSemaphore(blocks)
        reading = Mutex((stream, watched))
    }

    func readSource(while goesOn: () throws -> Bool) throws -> SourceSummary? {
        // Whatever happens, those who wait go on.
        defer {
            state.withLock { $0.isOver = true }
            readyCount.signal()
        }
        return try reading.withLock { reading in
            guard try read(reading.stream, while: goesOn) else { return nil }
            let digests = reading.source.digests
            return SourceSummary(bytes: digests.length, sha256: try digests.finish())
        }
    }

    private func read(_ stream: VMDK.ForwardReader, while goesOn: () throws -> Bool) throws -> Bool {
        while true {
            while !freeCount.wait(for: .milliseconds(100)) {
                if !(try goesOn()) { return false }
            }
            if !(try goesOn()) { return false }
            let block = state.withLock { $0.free.popLast() } ?? stream.makeBlock()
            do {
                guard try stream.next(block) else { return true }
            } catch is VMDK.ForwardReader.NotSequential {
                try fallBack()
                try stream.drain()
                return true
            }
            state.withLock { $0.ready.append(block) }
            readyCount.signal()
        }
    }

    /// The chunks not yet queued are found through the tables instead.
    private func fallBack() throws {
        guard let disk else { return }
        try state.withLock { state in
            let last = state.ready.last?.index
            let first = last.map { $0 + 1 } ?? (state.position + UInt64(Chunk.size) - 1) / UInt64(Chunk.size)
            state.fallback = try ChunkQueue(
                disk, nil, from: first, ticket: state.ticket + UInt64(state.ready.count))
        }
        readyCount.signal()
    }

    func next(while goesOn: () throws -> Bool) throws -> ChunkWork {
        while !readyCount.wait(for: .milliseconds(100)) {
            if !(try goesOn()) { return ChunkWork() }
        }
        let (work, fallback) = state.withLock { state -> (ChunkWork, ChunkQueue?) in
            guard !state.ready.isEmpty else {
                // Pass the news on to the next thread.
                readyCount.signal()
                defer { if state.fallback == nil { state.position = capacity } }
                return (ChunkWork(skipped: state.fallback == nil ? capacity - state.position : 0), state.fallback)
            }
            let block = state.ready.removeFirst()
            let chunk = Chunk(index: block.index, capacity: capacity)
            let work = ChunkWork(
                ticket: state.ticket, chunk: chunk, skipped: chunk.offset - state.position, block: block)
            state.ticket += 1
            state.position = chunk.offset + UInt64(chunk.count)
            return (work, nil)
        }
        return try fallback?.next(while: goesOn) ?? work
    }

    func recycle(_ block: GrainBlock) {
        state.withLock { $0.free.append(block) }
        freeCount.signal()
    }
}
