import FoundationEssentials
import Glibc
import HostKit
import Messaging
import MigrationModel
import Synchronization

/// A task's last record in the journal.
struct JournalEntry: Codable, Sendable {
    var task: String
    var attempt: UInt32
    var fence: UInt64
    /// SHA-256 of the request: a stored result answers only the request it was made for.
    var request: String
    /// The serialized `TaskEvent` of the end.
    var ended: Data?
    /// The coordinator has the result. The fence stays known, so that a late copy of the task is not run again.
    var forgotten = false
    /// Which of the host's processes took it on: each has a larger number than the one before.
    var process: Int
    /// It was stopped in order when its process ended.
    var stopped: Bool?

    var identity: CallIdentity { CallIdentity(task: task, attempt: attempt, fence: fence) }

    /// What `JSONDecoder` reads, made without `JSONEncoder`: it takes longer than the rest of a record's way. Throws for a
    /// task whose name is no identifier, which would need escapes.
    fileprivate var json: [UInt8] {
        get throws {
            guard TaskCall.isIdentifier(task) else {
                throw MigrationError(.invalidArgument, "'\(task)' is no task id that a journal can hold")
            }
            let end = ended.map { ",\"ended\":\"\($0.base64EncodedString())\"" } ?? ""
            let stop = stopped == true ? ",\"stopped\":true" : ""
            return Array(
                "{\"task\":\"\(task)\",\"attempt\":\(attempt),\"fence\":\(fence),\"request\":\"\(request)\"\(end),\"forgotten\":\(forgotten),\"process\":\(process)\(stop)}"
                    .utf8)
        }
    }
}

/// The journal's file: text that is only appended to, and replaced by a shorter one now and then.
///
/// A line is sixteen hexadecimal digits of the SHA-256 of the rest, a separator, and one JSON record. Lines written with
/// one fsync are a batch: a space separates in its first line, `+` in the others. Of the last batch a crash may have cut
/// or torn any part, in any order; it is dropped from the first damaged line on: nobody was told of it. A damaged line
/// before the last batch means a damaged disk, and reading fails.
///
/// A replacement is written and fsynced under another name and renamed: a crash leaves the one file or the other.
final class JournalFile: Sendable {
    private struct State {
        var file: File
        var end: UInt64
        /// Whether the file's name is on stable storage. Nothing counts as written before.
        var isNamed = false
        /// The size beyond which it has grown too much.
        var limit: UInt64
    }

    private static let start = UInt8(ascii: " ")
    private static let continuation = UInt8(ascii: "+")

    private let path: String
    private let growth: UInt64
    private let state: Mutex<State>

    /// Writes the file anew.
    ///
    /// - Parameter growth: bytes of history, beside as much as there is of use, that a file may hold.
    init(_ path: String, _ entries: [JournalEntry], growth: UInt64) throws {
        self.path = path
        self.growth = growth
        state = Mutex(try Self.made(path, entries, growth: growth))
        try synchronizeName()
    }

    /// Whether it is time for `replace`.
    var isOvergrown: Bool { state.withLock { $0.end > $0.limit } }

    /// Returns once the entries are durable. One caller at a time.
    func append(_ entries: [JournalEntry]) throws {
        let bytes = try Self.lines(entries)
        try synchronizeName()
        try state.withLock { state in
            do {
                try state.file.write(bytes, at: state.end)
                try state.file.synchronizeData()
            } catch {
                // The next record must not follow half of this one.
                try state.file.truncate(to: state.end)
                throw error
            }
            state.end += UInt64(bytes.count)
        }
    }

    /// Puts a file with these entries alone in its place. When that fails the file that is there goes on, and it is time
    /// again when that has grown further.
    func replace(with entries: [JournalEntry]) throws {
        do {
            let made = try Self.made(path, entries, growth: growth)
            state.withLock { $0 = made }
        } catch {
            state.withLock { $0.limit = $0.end + growth }
            throw error
        }
        try synchronizeName()
    }

    /// The name's directory. What fails is tried again before the next record.
    private func synchronizeName() throws {
        try state.withLock { state in
            if state.isNamed { return }
            try Files.synchronizeDirectory(of: path)
            state.isNamed = true
        }
    }

    private static func made(_ path: String, _ entries: [JournalEntry], growth: UInt64) throws -> State {
        var bytes: [UInt8] = []
        for entry in entries { bytes += try lines([entry]) }
        let temporary = "\(path).tmp"
        let file = try File(temporary, O_WRONLY | O_CREAT | O_TRUNC)
        try file.write(bytes, at: 0)
        try file.synchronize()
        Failpoint.workerJournalWritten.hit()
        guard rename(temporary, path) == 0 else { throw systemError("rename \(temporary) to", path) }
        Failpoint.workerJournalReplaced.hit()
        let end = UInt64(bytes.count)
        return State(file: file, end: end, limit: 2 * end + growth)
    }

    // MARK: - Lines

    /// One batch.
    private static func lines(_ entries: [JournalEntry]) throws -> [UInt8] {
        var bytes: [UInt8] = []
        for entry in entries {
            let json = try entry.json
            let separator = bytes.isEmpty ? start : continuation
            bytes += checksum(json)
            bytes.append(separator)
            bytes += json
            bytes.append(UInt8(ascii: "\n"))
        }
        return bytes
    }

    private static func checksum(_ json: [UInt8]) -> [UInt8] { Array(hex(Digest.hash(.sha256, json).prefix(8)).utf8) }

    /// The records in their order; none where there is no file.
    static func read(_ path: String) throws -> [JournalEntry] {
        guard Files.exists(path) else { return [] }
        var entries: [JournalEntry] = []
        var damaged: Int?
        var lines = try Files.read(path, limit: 1 << 30)
            .split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        // After a complete journal the last piece is empty; otherwise it is a record whose write a crash cut short.
        _ = lines.popLast()
        for (index, line) in lines.enumerated() {
            let json = Array(line.dropFirst(17))
            let separator = line.dropFirst(16).first
            guard line.count > 17, separator == start || separator == continuation,
                checksum(json) == Array(line.prefix(16)),
                let entry = try? JSONDecoder().decode(JournalEntry.self, from: Data(json))
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
