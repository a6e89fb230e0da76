package import FlotillaProtocol
import FoundationEssentials
import Glibc
import HostKit
package import Messaging
package import MigrationModel
import SwiftProtobuf
import Synchronization

/// What a worker must still know after a crash: which tasks it took on, under which fence, and how those ended whose
/// result the coordinator has not confirmed. One append-only text file, fsynced at every record.
///
/// A line is sixteen hexadecimal digits of the SHA-256 of the rest, a space, and one JSON record. A line that a crash
/// cut short or tore is the last one, and is dropped: nobody was told of it. A damaged line before the last means a
/// damaged disk, and opening the journal fails. Opening rewrites the file with only what still matters.
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
        var entries: [String: Entry] = [:]
        /// Tasks in the order of their last record.
        var order: [String] = []
        var end: UInt64 = 0
        var watchers: [AsyncStream<Void>.Continuation] = []
        /// Tasks whose clean-up failed in this process. They stay in the journal for the next.
        var unswept: Set<String> = []
    }

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
        let surplus = state.order.filter { state.entries[$0]?.forgotten ?? true }.dropLast(Self.remembered)
        for task in surplus { state.entries[task] = nil }
        state.order.removeAll { state.entries[$0] == nil }

        var bytes: [UInt8] = []
        for task in state.order { if let entry = state.entries[task] { bytes += try Self.line(entry) } }
        try Files.writeAtomically(bytes, to: path)
        state.end = UInt64(bytes.count)
        interrupted = state.order.compactMap { state.entries[$0] }.filter { $0.ended == nil && !$0.forgotten }
            .map(\.identity)
        file = try File(path, O_WRONLY)
        self.state = Mutex(state)
        self.cleanUp = cleanUp
        self.answers = answers
    }

    package func admit(_ call: TaskCall) async throws -> Admission {
        let request = hex(Digest.hash(.sha256, call.body))
        let identity = call.identity
        return try await blocking("journal") { [self] in
            try state.withLock { state in
                let earlier = state.entries[identity.task]
                if let earlier, identity.fence < earlier.fence { return .stale }
                if let earlier, identity.fence == earlier.fence, earlier.forgotten { return .stale }
                var entry = Entry(
                    task: identity.task, attempt: identity.attempt, fence: identity.fence, request: request)
                if let earlier, !earlier.forgotten, let data = earlier.ended, earlier.request == request,
                    earlier.fence == identity.fence || answers(call.method)
                {
                    let event = try TaskEvent(serializedBytes: data)
                    if earlier.fence == identity.fence || event.ended.code == 0 {
                        entry.ended = try TaskEvent(identity, sequence: event.seq, .ended(event.ended))
                            .serializedBytes()
                        try append(entry, &state)
                        return .ended(event.ended)
                    }
                }
                try append(entry, &state)
                return .run
            }
        }
    }

    package func recordEnd(of call: CallIdentity, _ event: TaskEvent) async throws {
        let data: Data = try event.serializedBytes()
        try await blocking("journal") { [self] in
            try state.withLock { state in
                guard var entry = state.entries[call.task], entry.identity == call else {
                    throw MigrationError(.aborted, "\(call) is not the attempt the journal knows")
                }
                entry.ended = data
                try append(entry, &state)
            }
        }
    }

    package func acknowledge(task: String, fence: UInt64) async throws {
        try await blocking("journal") { [self] in
            // Swept under the lock: an attempt that is admitted meanwhile must not work in a folder that is going.
            let watchers = try state.withLock { state in
                guard var entry = state.entries[task], entry.fence == fence, let data = entry.ended else {
                    return [AsyncStream<Void>.Continuation]()
                }
                // What failed may be tried again and goes on from its checkpoint; only an end for good is swept.
                let ended = try TaskEvent(serializedBytes: data).ended
                if ended.code == 0 || ended.code == MigrationError.Code.cancelled.rawValue {
                    do { try cleanUp(task) } catch {
                        state.unswept.insert(task)
                        for watcher in state.watchers { watcher.yield() }
                        throw error
                    }
                }
                entry.ended = nil
                entry.forgotten = true
                try append(entry, &state)
                return state.watchers
            }
            for watcher in watchers { watcher.yield() }
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
        let events = try? await blocking("journal") { [self] in
            state.withLock { state in
                state.order.compactMap { state.entries[$0]?.ended }.compactMap { try? TaskEvent(serializedBytes: $0) }
            }
        }
        return events ?? []
    }

    // MARK: - The file

    private func append(_ entry: Entry, _ state: inout State) throws {
        let bytes = try Self.line(entry)
        do {
            try file.write(bytes, at: state.end)
            try file.synchronizeData()
        } catch {
            // The next record must not follow half of this one.
            try file.truncate(to: state.end)
            throw error
        }
        state.end += UInt64(bytes.count)
        Self.apply(entry, to: &state)
    }

    private static func apply(_ entry: Entry, to state: inout State) {
        if state.entries.updateValue(entry, forKey: entry.task) != nil { state.order.removeAll { $0 == entry.task } }
        state.order.append(entry.task)
    }

    private static func line(_ entry: Entry) throws -> [UInt8] {
        let json = [UInt8](try JSONEncoder().encode(entry))
        return Array(checksum(json).utf8) + [UInt8(ascii: " ")] + json + [UInt8(ascii: "\n")]
    }

    private static func checksum(_ json: some Sequence<UInt8>) -> String {
        hex(Digest.hash(.sha256, Array(json)).prefix(8))
    }

    private static func parse(_ bytes: [UInt8], _ path: String) throws -> [Entry] {
        var entries: [Entry] = []
        var lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        // After a complete journal the last piece is empty; otherwise it is a record whose write a crash cut short.
        _ = lines.popLast()
        for (number, line) in lines.enumerated() {
            let json = line.dropFirst(17)
            guard line.count > 17, checksum(json) == String(decoding: line.prefix(16), as: UTF8.self),
                let entry = try? JSONDecoder().decode(Entry.self, from: Data(json))
            else {
                if number == lines.count - 1 { break }
                throw MigrationError(
                    .dataLoss, "journal \(path): line \(number + 1) is damaged",
                    hint: "check the disk; move the file away to start with an empty journal once no task is under way")
            }
            entries.append(entry)
        }
        return entries
    }
}
