package import FlotillaProtocol
import FoundationEssentials
import Glibc
import HostKit
package import Messaging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// What a worker must still know after a crash: which tasks it took on, under which fence, and how those ended whose
/// result the coordinator has not confirmed. One append-only text file, fsynced before anybody is told of a record.
///
/// A line is sixteen hexadecimal digits of the SHA-256 of the rest, a separator, and one JSON record. Lines written with
/// one fsync are a batch: a space separates in its first line, `+` in the others. Of the last batch a crash may have cut
/// or torn any part, in any order; it is dropped from the first damaged line on: nobody was told of it. A damaged line
/// before the last batch means a damaged disk, and opening the journal fails. Opening rewrites the file with only what
/// still matters.
package final class Journal: TaskLedger {
    private struct Entry: Codable {
        var task: String
        var attempt: UInt32
        var fence: UInt64
        /// SHA-256 of the request: a stored result answers only the request it was made for.
        var request: String
        /// The serialized `TaskEvent` of the end.
        var ended: Data?
        /// The coordinator has the result. The fence stays known, so that a late copy of the task is not run again.
        var forgotten = false

        var identity: CallIdentity { CallIdentity(task: task, attempt: attempt, fence: fence) }
    }

    private struct State {
        /// With the number of their last record: its place in the order of all.
        var entries: [String: (entry: Entry, number: Int)] = [:]
        var next = 0
        var end: UInt64 = 0
        var watchers: [AsyncStream<Void>.Continuation] = []
        /// Tasks whose clean-up failed in this process. They stay in the journal for the next.
        var unswept: Set<String> = []
        var waiting: [Change] = []
        var isWriting = false

        var inOrder: [Entry] { entries.values.sorted { $0.number < $1.number }.map(\.entry) }
    }

    /// One task's next record, to be decided and written on the journal's thread.
    private struct Change: Sendable {
        let task: String
        /// From the task's present entry to the one to write, nil for none, and who waits for that to be durable.
        let decide: @Sendable (Entry?) -> (Entry?, @Sendable (Result<Void, any Error>) -> Void)
    }

    /// Records written together, with one fsync.
    private static let batch = 512
    /// Forgotten tasks whose fences are remembered.
    private static let remembered = 10_000

    /// What an earlier process had taken on and not ended.
    package let interrupted: [CallIdentity]

    private let file: File
    private let state: Mutex<State>
    private let cleanUp: @Sendable (String) throws -> Void
    private let answers: @Sendable (String) -> Bool

    /// - Parameters:
    ///   - answers: whether a stored success of this gRPC method may answer a later attempt. Only for work that is
    ///     expensive and whose result can't have changed since.
    ///   - cleanUp: removes what a task left on disk besides its result; called before it is forgotten.
    package init(
        path: String, answers: @escaping @Sendable (String) -> Bool,
        cleanUp: @escaping @Sendable (String) throws -> Void
    ) throws {
        var state = State()
        if Files.exists(path) {
            for entry in try Self.parse(Files.read(path, limit: 1 << 30), path) { Self.apply(entry, to: &state) }
        }
        let surplus = state.inOrder.filter(\.forgotten).dropLast(Self.remembered)
        for entry in surplus { state.entries[entry.task] = nil }

        var bytes: [UInt8] = []
        for entry in state.inOrder { bytes += try Self.line(entry) }
        try Files.writeAtomically(bytes, to: path)
        state.end = UInt64(bytes.count)
        interrupted = state.inOrder.filter { $0.ended == nil && !$0.forgotten }.map(\.identity)
        file = try File(path, O_WRONLY)
        self.state = Mutex(state)
        self.cleanUp = cleanUp
        self.answers = answers
    }

    package func admit(_ call: TaskCall) async throws -> Admission {
        let request = hex(Digest.hash(.sha256, call.body))
        let identity = call.identity
        return try await change(identity.task) { [answers] earlier in
            if let earlier, identity.fence < earlier.fence { return (.stale, nil) }
            if let earlier, identity.fence == earlier.fence, earlier.forgotten { return (.stale, nil) }
            var entry = Entry(
                task: identity.task, attempt: identity.attempt, fence: identity.fence, request: request)
            if let earlier, !earlier.forgotten, let data = earlier.ended, earlier.request == request,
                earlier.fence == identity.fence || answers(call.method)
            {
                let event = try TaskEvent(serializedBytes: data)
                if earlier.fence == identity.fence || event.ended.code == 0 {
                    entry.ended = try TaskEvent(identity, sequence: event.seq, .ended(event.ended)).serializedBytes()
                    return (.ended(event.ended), entry)
                }
            }
            return (.run, entry)
        }
    }

    package func recordEnd(of call: CallIdentity, _ event: TaskEvent) async throws {
        let data: Data = try event.serializedBytes()
        try await change(call.task) { earlier in
            guard var entry = earlier, entry.identity == call else {
                throw MigrationError(.aborted, "\(call) is not the attempt the journal knows")
            }
            entry.ended = data
            return ((), entry)
        }
    }

    package func acknowledge(task: String, fence: UInt64) async throws {
        let isForgotten = try await change(task) { [self] earlier in
            guard var entry = earlier, entry.fence == fence, let data = entry.ended else { return (false, nil) }
            // What failed may be tried again and goes on from its checkpoint; only an end for good is swept. An attempt
            // that is admitted meanwhile waits for this change: it must not work in a folder that is going.
            let ended = try TaskEvent(serializedBytes: data).ended
            if ended.code == 0 || ended.code == MigrationError.Code.cancelled.rawValue {
                do { try cleanUp(task) } catch {
                    let watchers = state.withLock { state in
                        state.unswept.insert(task)
                        return state.watchers
                    }
                    for watcher in watchers { watcher.yield() }
                    throw error
                }
            }
            entry.ended = nil
            entry.forgotten = true
            return (true, entry)
        }
        guard isForgotten else { return }
        for watcher in state.withLock({ $0.watchers }) { watcher.yield() }
    }

    /// Returns once no result of the chosen tasks waits to be stored and swept any more, or when cancelled. Does not wait
    /// for what can't be swept: that was reported, and the next process tries again.
    package func settled(_ isChosen: @escaping @Sendable (String) -> Bool) async {
        let (changes, continuation) = AsyncStream<Void>.makeStream(bufferingPolicy: .bufferingNewest(1))
        state.withLock { $0.watchers.append(continuation) }
        continuation.yield()
        for await _ in changes {
            let unswept = state.withLock { $0.unswept }
            if await unacknowledged().allSatisfy({ !isChosen($0.taskID) || unswept.contains($0.taskID) }) { return }
        }
    }

    package func unacknowledged() async -> [TaskEvent] {
        state.withLock { state in
            state.entries.values.filter { $0.entry.ended != nil }.sorted { $0.number < $1.number }
        }.compactMap { entry, _ in entry.ended.flatMap { try? TaskEvent(serializedBytes: $0) } }
    }

    // MARK: - The file

    /// Returns once what `decide` makes of the task's present entry is durable. Changes that come while others are being
    /// written are written together, with one fsync; those of one task one after the other.
    private func change<Value: Sendable>(
        _ task: String, _ decide: @escaping @Sendable (Entry?) throws -> (Value, Entry?)
    ) async throws -> Value {
        try await withCheckedThrowingContinuation { continuation in
            let change = Change(task: task) { earlier in
                do {
                    let (value, entry) = try decide(earlier)
                    return (entry, { continuation.resume(with: $0.map { value }) })
                } catch {
                    return (nil, { _ in continuation.resume(throwing: error) })
                }
            }
            let starts = state.withLock { state in
                state.waiting.append(change)
                defer { state.isWriting = true }
                return !state.isWriting
            }
            if starts { spawnThread("journal") { self.writeAll() } }
        }
    }

    private func writeAll() {
        while let changes = next() {
            var entries: [Entry] = []
            var waiting: [@Sendable (Result<Void, any Error>) -> Void] = []
            for change in changes {
                let (entry, isWritten) = change.decide(state.withLock { $0.entries[change.task]?.entry })
                if let entry { entries.append(entry) }
                waiting.append(isWritten)
            }
            let result = Result { try append(entries) }
            for isWritten in waiting { isWritten(result) }
        }
    }

    /// The changes that wait, up to the second of the same task; nil when there are none.
    private func next() -> [Change]? {
        state.withLock { state in
            var tasks: Set<String> = []
            let changes = state.waiting.prefix(Self.batch).prefix { tasks.insert($0.task).inserted }
            state.waiting.removeFirst(changes.count)
            if changes.isEmpty { state.isWriting = false }
            return changes.isEmpty ? nil : Array(changes)
        }
    }

    private func append(_ entries: [Entry]) throws {
        guard !entries.isEmpty else { return }
        var bytes: [UInt8] = []
        for entry in entries { bytes += try Self.line(entry, startsBatch: bytes.isEmpty) }
        let end = state.withLock { $0.end }
        do {
            try file.write(bytes, at: end)
            try file.synchronizeData()
        } catch {
            // The next record must not follow half of this one.
            try file.truncate(to: end)
            throw error
        }
        state.withLock { state in
            state.end += UInt64(bytes.count)
            for entry in entries { Self.apply(entry, to: &state) }
        }
    }

    private static func apply(_ entry: Entry, to state: inout State) {
        state.entries[entry.task] = (entry, state.next)
        state.next += 1
    }

    private static let start = UInt8(ascii: " ")
    private static let continuation = UInt8(ascii: "+")

    private static func line(_ entry: Entry, startsBatch: Bool = true) throws -> [UInt8] {
        let json = [UInt8](try JSONEncoder().encode(entry))
        return Array(checksum(json).utf8) + [startsBatch ? start : continuation] + json + [UInt8(ascii: "\n")]
    }

    private static func checksum(_ json: some Sequence<UInt8>) -> String {
        hex(Digest.hash(.sha256, Array(json)).prefix(8))
    }

    private static func parse(_ bytes: [UInt8], _ path: String) throws -> [Entry] {
        var entries: [Entry] = []
        var damaged: Int?
        var lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        // After a complete journal the last piece is empty; otherwise it is a record whose write a crash cut short.
        _ = lines.popLast()
        for (index, line) in lines.enumerated() {
            let json = line.dropFirst(17)
            let separator = line.dropFirst(16).first
            guard line.count > 17, separator == start || separator == continuation,
                checksum(json) == String(decoding: line.prefix(16), as: UTF8.self),
                let entry = try? JSONDecoder().decode(Entry.self, from: Data(json))
            else {
                damaged = damaged ?? index
                continue
            }
            guard let damaged else {
                entries.append(entry)
                continue
            }
            if separator == continuation { continue }
            throw MigrationError(
                .dataLoss, "journal \(path): line \(damaged + 1) is damaged",
                hint: "check the disk; move the file away to start with an empty journal once no task is under way")
        }
        return entries
    }
}
