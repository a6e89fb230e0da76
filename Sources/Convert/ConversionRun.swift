import Dispatch
import DiskImage
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// The threads of one conversion: several convert chunks, one reads or hashes the source, the caller's reports progress
/// and takes checkpoints that are due by time.
final class ConversionRun: Sendable {
    struct Outcome {
        let source: SourceSummary
        /// nil where digests weren't wanted.
        let contentDigest: [UInt8]?
    }

    private struct State {
        var progress: DiskConversion.Progress
        var content: OrderedDigests
        /// What the log doesn't have yet.
        var pending: [CheckpointLog.ChunkRecord] = []
        var pendingBytes: UInt64 = 0
        var source: SourceSummary?
        var failure: (any Error)?
    }

    private let disk: (any DiskSource)?
    private let writer: any DiskWriter
    /// Knows every chunk that is in the image, once a checkpoint was taken.
    private let log: CheckpointLog
    private let options: DiskConversion.Options
    private let stop: StopFlag
    private let feed: any ChunkFeed
    private let state: Mutex<State>
    private let failed = Atomic<Bool>(false)
    /// Held while a checkpoint is taken: records enter the log in the order their data was synced.
    private let checkpointing = Mutex(())

    /// - Parameters:
    ///   - disk: nil for a stream that `feed` alone reads.
    ///   - log: started, or read and found to be this conversion's.
    init(
        _ disk: (any DiskSource)?, _ feed: any ChunkFeed, _ writer: any DiskWriter, _ log: CheckpointLog,
        options: DiskConversion.Options, stop: StopFlag
    ) throws {
        self.disk = disk
        self.feed = feed
        self.writer = writer
        self.log = log
        self.options = options
        self.stop = stop
        let capacity = writer.capacity
        try log.adopt {
            try stop.check()
            return try writer.adopt($0)
        }
        state = Mutex(
            State(
                progress: DiskConversion.Progress(
                    doneBytes: 0, capacity: capacity, dataBytes: 0, writtenBytes: 0, resumedBytes: 0),
                content: OrderedDigests(capacity: capacity)))
    }

    func run(_ progress: (DiskConversion.Progress) -> Void) throws -> Outcome {
        progress(state.withLock { $0.progress })
        let group = DispatchGroup()
        for number in 0..<options.threadCount { start(group, "convert-\(number)") { try $0.convertChunks() } }
        start(group, "read-source") { try $0.readSource() }
        var due = DispatchTime.now() + options.checkpointSeconds
        while group.wait(timeout: .now() + .milliseconds(200)) == .timedOut {
            progress(state.withLock { $0.progress })
            let start = DispatchTime.now()
            guard start >= due else { continue }
            attempt { try checkpoint() }
            let end = DispatchTime.now()
            let cost = Double(end.uptimeNanoseconds - start.uptimeNanoseconds) / 1e9
            due = end + max(options.checkpointSeconds, 20 * cost)
        }
        // Also after a failure, so that the next run has less to do.
        attempt { try checkpoint() }
        if let failure = state.withLock({ $0.failure }) { throw failure }
        progress(state.withLock { $0.progress })
        return try finish(progress)
    }

    private func start(
        _ group: DispatchGroup, _ name: String, _ body: @escaping @Sendable (ConversionRun) throws -> Void
    ) {
        group.enter()
        spawnThread(name) {
            self.attempt { try body(self) }
            group.leave()
        }
    }

    /// The first error ends all threads.
    private func attempt(_ body: () throws -> Void) {
        do { try body() } catch {
            state.withLock { if $0.failure == nil { $0.failure = error } }
            failed.store(true, ordering: .releasing)
        }
    }

    /// Returns false when another thread failed.
    private func goesOn() throws -> Bool {
        try stop.check()
        return !failed.load(ordering: .acquiring)
    }

    private func readSource() throws {
        let summary = try feed.readSource(while: goesOn)
        state.withLock { $0.source = summary }
    }

    private func convertChunks() throws {
        let reader = try disk?.makeReader()
        let inflater = GrainInflater()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
        defer { buffer.deallocate() }
        while try goesOn() {
            let work = try feed.next(while: goesOn)
            if work.skipped > 0 { state.withLock { $0.progress.doneBytes += work.skipped } }
            guard let chunk = work.chunk else { return }
            defer { if let block = work.block { feed.recycle(block) } }
            if let record = try log.record(of: chunk.index) {
                if try isIntact(record, chunk, buffer) {
                    log.confirm(chunk.index)
                    state.withLock {
                        $0.content.add(record.digest, chunk: chunk.index, ticket: work.ticket)
                        $0.progress.resumedBytes += UInt64(chunk.count)
                    }
                    account(chunk, isData: true)
                    continue
                }
                log.forget(chunk.index)
                if record.placement.bitmap != 0 { try writer.release(chunk, at: record.placement) }
            }
            var scan = ChunkScan(UnsafeRawBufferPointer(rebasing: buffer[..<chunk.count]), options.checksum)
            var content = ChunkContent.zero
            if let block = work.block {
                try inflater.inflate(block, chunk, into: buffer) { scan.filled($0) }
                content = .data
            } else if let reader {
                content = try reader.read(
                    at: chunk.offset, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count]))
                if content == .data {
                    try options.rateLimit?.take(chunk.count, stop: stop)
                    scan.filled(chunk.count)
                }
            }
            try store(work.ticket, chunk, content, &scan, buffer)
        }
    }

    private func isIntact(
        _ record: CheckpointLog.ChunkRecord, _ chunk: Chunk, _ buffer: UnsafeMutableRawBufferPointer
    ) throws -> Bool {
        // A chunk that turned out to be zeros has nothing in the image; its digest is the log's word.
        if record.placement.bitmap == 0 { return true }
        guard try writer.read(chunk, at: record.placement, into: buffer) else { return false }
        var scan = ChunkScan(UnsafeRawBufferPointer(rebasing: buffer[..<chunk.count]), options.checksum)
        scan.filled(chunk.count)
        return scan.finish() == record.digest
    }

    private func store(
        _ ticket: UInt64, _ chunk: Chunk, _ content: ChunkContent, _ scan: inout ChunkScan,
        _ buffer: UnsafeMutableRawBufferPointer
    ) throws {
        guard content == .data else {
            state.withLock { $0.content.add(nil, chunk: chunk.index, ticket: ticket) }
            return account(chunk, isData: false)
        }
        let digest = scan.finish()
        let placement =
            scan.bitmap == 0
            ? ChunkPlacement(index: chunk.index, hostOffset: 0, bitmap: 0)
            : try writer.write(chunk, bitmap: scan.bitmap, from: buffer)
        Failpoint.convertChunkWritten.hit()
        let record = CheckpointLog.ChunkRecord(placement: placement, digest: digest)
        let written = placement.storedBytes
        let pending = state.withLock {
            $0.content.add(digest, chunk: chunk.index, ticket: ticket)
            $0.pending.append(record)
            $0.pendingBytes += written
            $0.progress.writtenBytes += written
            return $0.pendingBytes
        }
        account(chunk, isData: true)
        // Nobody waits for another thread's fdatasync, unless the disk falls far behind.
        let batch = options.checkpointBytes ?? (writer.isDirect ? .max : 256 << 20)
        if pending / batch >= 4 {
            try checkpoint()
        } else if pending >= batch {
            _ = try checkpointing.withLockIfAvailable { _ in try saveProgress() }
        }
    }

    private func account(_ chunk: Chunk, isData: Bool) {
        state.withLock {
            $0.progress.doneBytes += UInt64(chunk.count)
            if isData { $0.progress.dataBytes += UInt64(chunk.count) }
        }
    }

    /// Makes what was written so far survive a crash: data first, then the records that promise it.
    private func checkpoint() throws { try checkpointing.withLock { _ in try saveProgress() } }

    /// Called with `checkpointing` held.
    private func saveProgress() throws {
        let records = state.withLock { state in
            defer {
                state.pending = []
                state.pendingBytes = 0
            }
            return state.pending
        }
        guard !records.isEmpty else { return }
        try writer.synchronizeData()
        try log.append(records)
        Failpoint.convertCheckpoint.hit()
    }

    private func finish(_ progress: (DiskConversion.Progress) -> Void) throws -> Outcome {
        var lastReport = DispatchTime.now()
        try writer.finish(log.placements) { done, total in
            try stop.check()
            guard DispatchTime.now() >= lastReport + .milliseconds(200) else { return }
            lastReport = .now()
            progress(
                state.withLock {
                    ($0.progress.finishedBytes, $0.progress.finishBytes) = (done, total)
                    return $0.progress
                })
        }
        Failpoint.convertImageFinished.hit()
        let (source, content) = state.withLock { ($0.source, $0.content.finalize()) }
        return Outcome(
            source: source ?? SourceSummary(bytes: 0, sha256: nil),
            contentDigest: options.checksum == .none ? nil : content)
    }
}
