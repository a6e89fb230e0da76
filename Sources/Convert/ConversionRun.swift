import Dispatch
import DiskImage
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// The threads of one conversion: several convert chunks, one hashes the source, the caller's reports progress and
/// takes checkpoints that are due by time.
final class ConversionRun: Sendable {
    struct Outcome {
        let sourceBytes: UInt64
        let sourceSHA256: [UInt8]?
        let contentDigest: [UInt8]
    }

    private struct State {
        var progress: DiskConversion.Progress
        /// Every chunk that holds data and is in the image, in any order.
        var done: [CheckpointLog.ChunkRecord] = []
        /// Those of them that the log doesn't have yet.
        var pending: [CheckpointLog.ChunkRecord] = []
        var pendingBytes: UInt64 = 0
        var sourceSHA256: [UInt8]?
        var failure: (any Error)?
    }

    private let disk: any DiskSource
    private let writer: any DiskWriter
    private let log: CheckpointLog
    private let options: DiskConversion.Options
    private let hasher: SourceHasher
    private let stop: StopFlag
    private let queue: ChunkQueue
    /// What an interrupted run wrote, by chunk.
    private let recorded: [UInt64: CheckpointLog.ChunkRecord]
    private let state: Mutex<State>
    private let failed = Atomic<Bool>(false)
    /// Held while a checkpoint is taken: records enter the log in the order their data was synced.
    private let checkpointing = Mutex(())

    init(
        _ disk: any DiskSource, _ writer: any DiskWriter, _ log: CheckpointLog,
        records: [CheckpointLog.ChunkRecord], options: DiskConversion.Options, sourceName: String, stop: StopFlag
    ) throws {
        self.disk = disk
        self.writer = writer
        self.log = log
        self.options = options
        self.stop = stop
        hasher = SourceHasher(files: disk.files, name: sourceName, expected: options.expectedDigests)
        queue = try ChunkQueue(disk)
        recorded = try ConversionRun.adopt(records, disk, writer)
        state = Mutex(
            State(
                progress: DiskConversion.Progress(
                    doneBytes: 0, capacity: disk.capacity, dataBytes: 0, writtenBytes: 0, resumedBytes: 0)))
    }

    /// The latest record of each chunk, without those whose place in the image can't be theirs.
    private static func adopt(
        _ records: [CheckpointLog.ChunkRecord], _ disk: any DiskSource, _ writer: any DiskWriter
    ) throws -> [UInt64: CheckpointLog.ChunkRecord] {
        let total = Chunk.total(capacity: disk.capacity)
        var latest: [UInt64: Int] = [:]
        for (order, record) in records.enumerated() where record.placement.index < total {
            latest[record.placement.index] = order
        }
        let candidates = latest.values.sorted().map { records[$0] }
        let accepted = try writer.adopt(candidates.map(\.placement).filter { $0.bitmap != 0 })
        let places = Set(accepted.map(\.index))
        return Dictionary(
            candidates.filter { $0.placement.bitmap == 0 || places.contains($0.placement.index) }
                .map { ($0.placement.index, $0) }, uniquingKeysWith: { $1 })
    }

    func run(_ progress: (DiskConversion.Progress) -> Void) throws -> Outcome {
        progress(state.withLock { $0.progress })
        let threads = max(2, options.threads ?? processorCount() + 2)
        let group = DispatchGroup()
        for number in 0..<threads { start(group, "convert-\(number)") { try $0.convertChunks() } }
        if hasher.isWorthwhile { start(group, "hash-source") { try $0.hashSource() } }
        var lastCheckpoint = DispatchTime.now()
        while group.wait(timeout: .now() + .milliseconds(200)) == .timedOut {
            progress(state.withLock { $0.progress })
            if Double(DispatchTime.now().uptimeNanoseconds - lastCheckpoint.uptimeNanoseconds) / 1e9
                >= options.checkpointSeconds
            {
                attempt { try checkpoint() }
                lastCheckpoint = .now()
            }
        }
        // Also after a failure, so that the next run has less to do.
        attempt { try checkpoint() }
        if let failure = state.withLock({ $0.failure }) { throw failure }
        progress(state.withLock { $0.progress })
        return try finish()
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

    private struct Halted: Error {}

    private func hashSource() throws {
        do {
            let digest = try hasher.run { if !(try goesOn()) { throw Halted() } }
            state.withLock { $0.sourceSHA256 = digest }
        } catch is Halted {}
    }

    private func convertChunks() throws {
        let reader = try disk.makeReader()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
        defer { buffer.deallocate() }
        while try goesOn() {
            let (chunk, skipped) = try queue.next()
            if skipped > 0 { state.withLock { $0.progress.doneBytes += skipped } }
            guard let chunk else { return }
            if let record = recorded[chunk.index] {
                if try isIntact(record, chunk, buffer) {
                    state.withLock {
                        $0.done.append(record)
                        $0.progress.resumedBytes += UInt64(chunk.count)
                    }
                    account(chunk, isData: true)
                    continue
                }
                if record.placement.bitmap != 0 { try writer.release(chunk, at: record.placement) }
            }
            try convert(chunk, reader, buffer)
        }
    }

    private func isIntact(
        _ record: CheckpointLog.ChunkRecord, _ chunk: Chunk, _ buffer: UnsafeMutableRawBufferPointer
    ) throws -> Bool {
        // A chunk that turned out to be zeros has nothing in the image; its digest is the log's word.
        if record.placement.bitmap == 0 { return true }
        return try writer.read(chunk, at: record.placement, into: buffer)
            && sha256(UnsafeRawBufferPointer(rebasing: buffer[..<chunk.count])) == record.digest
    }

    private func convert(_ chunk: Chunk, _ reader: any DiskReader, _ buffer: UnsafeMutableRawBufferPointer) throws {
        let bytes = UnsafeMutableRawBufferPointer(rebasing: buffer[..<chunk.count])
        guard try reader.read(at: chunk.offset, into: bytes) == .data else { return account(chunk, isData: false) }
        let bitmap = Chunk.clusterBitmap(UnsafeRawBufferPointer(bytes))
        let digest = sha256(UnsafeRawBufferPointer(bytes))
        let offset = bitmap == 0 ? 0 : try writer.write(chunk, bitmap: bitmap, from: buffer)
        Failpoint.convertChunkWritten.hit()
        let placement = ChunkPlacement(index: chunk.index, hostOffset: offset, bitmap: bitmap)
        let record = CheckpointLog.ChunkRecord(placement: placement, digest: digest)
        let written = UInt64(placement.clusterCount * Chunk.clusterSize)
        let pending = state.withLock {
            $0.done.append(record)
            $0.pending.append(record)
            $0.pendingBytes += written
            $0.progress.writtenBytes += written
            return $0.pendingBytes
        }
        account(chunk, isData: true)
        // Nobody waits for another thread's fdatasync, unless the disk falls far behind.
        let batch = max(1, options.checkpointBytes)
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
        try writer.file.synchronizeData()
        try log.append(records)
        Failpoint.convertCheckpoint.hit()
    }

    private func finish() throws -> Outcome {
        var (records, sourceSHA256) = state.withLock { ($0.done, $0.sourceSHA256) }
        records.sort { $0.placement.index < $1.placement.index }
        try writer.finish(records.map(\.placement).filter { $0.bitmap != 0 })
        Failpoint.convertImageFinished.hit()
        var content = ContentDigest(capacity: disk.capacity)
        for record in records { content.add(record.digest, chunk: record.placement.index) }
        return Outcome(
            sourceBytes: hasher.length, sourceSHA256: sourceSHA256, contentDigest: content.finalize())
    }
}

private func processorCount() -> Int { max(1, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN)))) }
