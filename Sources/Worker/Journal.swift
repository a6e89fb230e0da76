package import FlotillaProtocol
import FoundationEssentials
import HostKit
package import Logging
package import Messaging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// What a worker must still know after a crash: which tasks it took on, under which fence, and how those ended whose
/// result the coordinator has not confirmed. `JournalFile` says how it is written. Holds, on disk as in memory, what is
/// under way and a bounded number of tasks that are not: opening it and, from time to time, a thread of its own forget the
/// rest.
package final class Journal: TaskLedger {
    private struct State {
        /// With the number of their last record: its place in the order of all.
        var entries: [String: (entry: JournalEntry, number: Int)] = [:]
        var next = 0
        var watchers: [AsyncStream<Void>.Continuation] = []
        /// Tasks whose clean-up failed in this process. They stay in the journal for the next.
        var unswept: Set<String> = []
        var waiting: [Change] = []
        var isWriting = false

        /// What is remembered: all but the oldest of the forgotten.
        mutating func trim() -> [JournalEntry] {
            let all = entries.values.sorted { $0.number < $1.number }.map(\.entry)
            for entry in all.filter(\.forgotten).dropLast(Journal.remembered) { entries[entry.task] = nil }
            return all.filter { entries[$0.task] != nil }
        }
    }

    /// One task's next record, to be decided and written on the journal's thread.
    private struct Change: Sendable {
        let task: String
        /// From the task's present entry to the one to write, nil for none, and who waits for that to be durable.
        let decide: @Sendable (JournalEntry?) -> (JournalEntry?, @Sendable (Result<Void, any Error>) -> Void)
    }

    /// Records written together, with one fsync.
    private static let batch = 512
    /// Forgotten tasks whose fences are remembered.
    private static let remembered = 10_000

    /// What an earlier process had taken on and not ended, in that order.
    package let interrupted: [CallIdentity]
    /// Of them, those that the last process had and did not stop in order.
    private let suspects: [String]
    private let process: Int

    private let file: JournalFile
    private let logger: Logger
    private let state: Mutex<State>
    private let sweeper: Sweeper
    private let answers: @Sendable (String) -> Bool

    /// - Parameters:
    ///   - answers: whether a stored success of this gRPC method may answer a later attempt. Only for work that is
    ///     expensive and whose result can't have changed since.
    ///   - cleanUp: removes what a task left on disk, before it is forgotten; its result, too, where that is of no use
    ///     to anybody. See `Sweeper`.
    ///   - growth: bytes of history that its file may hold beside as much as is of use.
    package init(
        path: String, answers: @escaping @Sendable (String) -> Bool, growth: UInt64 = 4 << 20, logger: Logger,
        cleanUp: @escaping Sweeper.CleanUp
    ) throws {
        var state = State()
        for entry in try JournalFile.read(path) { Self.apply(entry, to: &state) }
        let entries = state.trim()
        file = try JournalFile(path, entries, growth: growth)
        interrupted = entries.filter { $0.ended == nil && !$0.forgotten }.map(\.identity)
        let last = entries.map(\.process).max() ?? 0
        process = last + 1
        suspects = entries.filter {
            $0.ended == nil && !$0.forgotten && $0.process == last && $0.stopped != true
        }.map(\.task)
        self.state = Mutex(state)
        sweeper = Sweeper(cleanUp)
        self.answers = answers
        self.logger = logger
    }

    package func admit(_ call: TaskCall) async throws -> Admission {
        let request = hex(Digest.hash(.sha256, call.body))
        let identity = call.identity
        return try await change(identity.task) { [answers, process] earlier in
            if let earlier, identity.fence < earlier.fence { return (.stale, nil) }
            if let earlier, identity.fence == earlier.fence, earlier.forgotten { return (.stale, nil) }
            var entry = JournalEntry(
                task: identity.task, attempt: identity.attempt, fence: identity.fence, request: request,
                process: process)
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

    package func recordStop(of call: CallIdentity) async throws {
        try await change(call.task) { earlier in
            guard var entry = earlier, entry.identity == call, entry.ended == nil else { return ((), nil) }
            entry.stopped = true
            return ((), entry)
        }
    }

    /// Those of `interrupted` that may be what ended the last process: the others were stopped in order, or had not begun.
    /// Tasks begin in the order in which they were taken on, `slots` at once of those that take hours, and as many of others.
    package func suspects(slots: Int) -> Set<String> {
        let prompt = suspects.filter { task in
            [Stage.deploy, .undeploy].contains { task.hasSuffix("-\($0.rawValue)") }
        }
        let others = suspects.filter { !prompt.contains($0) }
        return Set(prompt.prefix(slots) + others.prefix(slots))
    }

    package func acknowledge(task: String, fence: UInt64) async throws {
        let known = state.withLock { $0.entries[task]?.entry }
        guard let known, known.fence == fence, let data = known.ended else { return }
        // What failed may be tried again and goes on from its checkpoint; only an end for good is swept.
        let ended = try TaskEvent(serializedBytes: data).ended
        if ended.code == 0 || ended.code == MigrationError.Code.cancelled.rawValue {
            do { try await sweeper.sweep(task, keepsResult: ended.code == 0) } catch {
                let watchers = state.withLock { state in
                    state.unswept.insert(task)
                    return state.watchers
                }
                for watcher in watchers { watcher.yield() }
                throw error
            }
        }
        try await forget(task) { $0.fence == fence && $0.ended != nil }
        for watcher in state.withLock({ $0.watchers }) { watcher.yield() }
    }

    package func discard(task: String, fence: UInt64) async throws -> Bool {
        let known = state.withLock { $0.entries[task]?.entry }
        if let known, known.fence > fence || known.ended != nil { return false }
        try await sweeper.sweep(task, keepsResult: false)
        try await forget(task) { $0.fence <= fence && $0.ended == nil }
        return true
    }

    private func forget(_ task: String, if isMeant: @escaping @Sendable (JournalEntry) -> Bool) async throws {
        try await change(task) { earlier in
            guard var entry = earlier, isMeant(entry) else { return ((), nil) }
            entry.ended = nil
            entry.forgotten = true
            return ((), entry)
        }
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

    // MARK: - Changes

    /// Returns once what `decide` makes of the task's present entry is durable. Changes that come while others are being
    /// written are written together, with one fsync; those of one task one after the other.
    private func change<Value: Sendable>(
        _ task: String, _ decide: @escaping @Sendable (JournalEntry?) throws -> (Value, JournalEntry?)
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
            var entries: [JournalEntry] = []
            var waiting: [@Sendable (Result<Void, any Error>) -> Void] = []
            for change in changes {
                let (entry, isWritten) = change.decide(state.withLock { $0.entries[change.task]?.entry })
                if let entry { entries.append(entry) }
                waiting.append(isWritten)
            }
            let result = Result { try append(entries) }
            for isWritten in waiting { isWritten(result) }
            if file.isOvergrown { compact() }
        }
    }

    private func compact() {
        do { try file.replace(with: state.withLock { $0.trim() }) } catch {
            logger.error("journal not shortened yet", metadata: ["error": "\(error)"])
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

    private func append(_ entries: [JournalEntry]) throws {
        guard !entries.isEmpty else { return }
        try file.append(entries)
        state.withLock { state in for entry in entries { Self.apply(entry, to: &state) } }
    }

    private static func apply(_ entry: JournalEntry, to state: inout State) {
        state.entries[entry.task] = (entry, state.next)
        state.next += 1
    }
}
