import FlotillaProtocol
import FoundationEssentials
import Glibc
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Worker

@Suite struct JournalTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private var path: String { "\(folder.path)/worker.journal" }

    func open(
        growth: UInt64 = 4 << 20, _ cleanUp: @escaping Sweeper.CleanUp = { _, _ in }
    ) throws -> Journal {
        try Journal(
            path: path, answers: { $0 == "Convert" }, growth: growth,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }, cleanUp: cleanUp)
    }

    func call(_ task: String, fence: UInt64, body: [UInt8] = [1]) -> TaskCall {
        TaskCall(
            identity: CallIdentity(task: task, attempt: UInt32(fence), fence: fence), method: "Convert", audience: "h",
            body: body)
    }

    func end(_ call: TaskCall, code: Int32 = 0) -> TaskEvent {
        TaskEvent(call.identity, sequence: 9, .ended(.with { $0.code = code }))
    }

    @Test func fencesOnlyGrow() async throws {
        let journal = try open()
        #expect(try await journal.admit(call("t", fence: 2)) == .run)
        #expect(try await journal.admit(call("t", fence: 1)) == .stale)
        #expect(try await journal.admit(call("t", fence: 2)) == .run)
        #expect(try await journal.admit(call("t", fence: 3)) == .run)
        let reopened = try open()
        #expect(try await reopened.admit(call("t", fence: 2)) == .stale)
    }

    /// What a killed process had taken on is what its successor releases: nothing that ended, under its last fence.
    @Test func interruptedTasksAreKnownToTheNextProcess() async throws {
        do {
            let journal = try open()
            #expect(journal.interrupted.isEmpty)
            for (task, fence) in [("a", 1), ("b", 1), ("c", 1), ("a", 2)] as [(String, UInt64)] {
                _ = try await journal.admit(call(task, fence: fence))
            }
            for task in ["b", "c"] {
                let ended = call(task, fence: 1)
                try await journal.recordEnd(of: ended.identity, end(ended))
            }
            try await journal.acknowledge(task: "c", fence: 1)
        }
        #expect(try open().interrupted == [CallIdentity(task: "a", attempt: 2, fence: 2)])
    }

    @Test func successOutlivesTheProcessAndAnswersTheNextAttempt() async throws {
        let first = call("t", fence: 1)
        do {
            let journal = try open()
            _ = try await journal.admit(first)
            try await journal.recordEnd(of: first.identity, end(first))
        }
        let journal = try open()
        #expect(await journal.unacknowledged().map(\.fence) == [1])
        #expect(try await journal.admit(call("t", fence: 2)) == .ended(TaskEnded()))
        #expect(await journal.unacknowledged().map(\.fence) == [2])
    }

    @Test func anotherRequestIsNotAnsweredWithAnOldResult() async throws {
        let journal = try open()
        let first = call("t", fence: 1)
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first))
        #expect(try await journal.admit(call("t", fence: 2, body: [2])) == .run)
    }

    @Test func onlyChosenMethodsAreAnsweredFromTheStore() async throws {
        let journal = try open()
        var first = call("t", fence: 1)
        first.method = "Deploy"
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first))
        var second = call("t", fence: 2)
        second.method = "Deploy"
        #expect(try await journal.admit(second) == .run)
    }

    @Test func settlingWaitsForTheChosenAlone() async throws {
        let journal = try open()
        for task in ["a-convert", "b-convert"] {
            let call = call(task, fence: 1)
            _ = try await journal.admit(call)
            try await journal.recordEnd(of: call.identity, end(call))
        }
        let waiting = Task { await journal.settled { $0.hasPrefix("a") } }
        try await journal.acknowledge(task: "a-convert", fence: 1)
        await waiting.value
        let cancelled = Task { await journal.settled { $0.hasPrefix("b") } }
        cancelled.cancel()
        await cancelled.value
        #expect(await journal.unacknowledged().map(\.taskID) == ["b-convert"])
    }

    @Test func failureIsRunAgainByALaterAttempt() async throws {
        let journal = try open()
        let first = call("t", fence: 1)
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first, code: 14))
        #expect(try await journal.admit(call("t", fence: 2)) == .run)
    }

    @Test func acknowledgedTaskIsSweptAndItsLateCopyNotRun() async throws {
        let journal = try open { [folder] task, keepsResult in
            #expect(keepsResult)
            try Files.writeAtomically([], to: "\(folder.path)/swept-\(task)")
        }
        let first = call("t", fence: 1)
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first))
        try await journal.acknowledge(task: "t", fence: 1)
        #expect(Files.exists("\(folder.path)/swept-t"))
        #expect(await journal.unacknowledged().isEmpty)
        await journal.settled { _ in true }
        #expect(try await journal.admit(first) == .stale)
        #expect(try await open().admit(first) == .stale)
        #expect(try await open().admit(call("t", fence: 2)) == .run)
    }

    @Test func whatFailsToSweepStaysUnacknowledged() async throws {
        let journal = try open { _, _ in throw MigrationError(.internal, "no") }
        let first = call("t", fence: 1)
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first))
        await #expect(throws: MigrationError.self) { try await journal.acknowledge(task: "t", fence: 1) }
        #expect(await journal.unacknowledged().count == 1)
        // Nobody waits for it in vain.
        await journal.settled { _ in true }
    }

    @Test func whatIsCancelledBetweenAttemptsIsSwept() async throws {
        let journal = try open { [folder] task, keepsResult in
            #expect(!keepsResult)
            try Files.writeAtomically([], to: "\(folder.path)/swept-\(task)")
        }
        for (task, code) in [("waiting", 14), ("unconfirmed", nil), ("released", nil)] as [(String, Int32?)] {
            let first = call(task, fence: 1)
            _ = try await journal.admit(first)
            if task != "released" { try await journal.recordEnd(of: first.identity, end(first, code: code ?? 0)) }
            if task == "waiting" { try await journal.acknowledge(task: task, fence: 1) }
            // A later attempt's work is not what was cancelled.
            #expect(try await journal.discard(task: task, fence: 0) == false)
            #expect(!Files.exists("\(folder.path)/swept-\(task)"))
            // The cancelled attempt need not have come here.
            #expect(try await journal.discard(task: task, fence: 2) == (task != "unconfirmed"))
            #expect(Files.exists("\(folder.path)/swept-\(task)") == (task != "unconfirmed"))
        }
        // Of which the journal knows nothing any more.
        #expect(try await journal.discard(task: "unknown", fence: 1))
        #expect(Files.exists("\(folder.path)/swept-unknown"))
        #expect(await journal.unacknowledged().map(\.taskID) == ["unconfirmed"])
        #expect(try open().interrupted.isEmpty)
    }

    @Test func acknowledgementOfAnOlderFenceKeepsTheResult() async throws {
        let journal = try open { _, _ in Issue.record("nothing may be swept") }
        let first = call("t", fence: 1)
        _ = try await journal.admit(first)
        try await journal.recordEnd(of: first.identity, end(first))
        _ = try await journal.admit(call("t", fence: 2))
        try await journal.acknowledge(task: "t", fence: 1)
        #expect(await journal.unacknowledged().map(\.fence) == [2])
    }

    @Test func everyCutOfTheFileOpens() async throws {
        do {
            let journal = try open()
            for number in 1...4 {
                let call = call("t\(number)", fence: 1)
                _ = try await journal.admit(call)
                try await journal.recordEnd(of: call.identity, end(call))
            }
        }
        let whole = try Files.read(path)
        var ends: [Int] = []
        for cut in stride(from: 0, through: whole.count, by: 7) {
            try Files.writeAtomically(Array(whole[..<cut]), to: path)
            ends.append(await (try open()).unacknowledged().count)
        }
        #expect(ends == ends.sorted())
        #expect(ends.first == 0)
    }

    @Test func damagedLastLineIsDropped() async throws {
        do {
            let journal = try open()
            for number in 1...3 { _ = try await journal.admit(call("t\(number)", fence: 5)) }
        }
        var bytes = try Files.read(path)
        bytes[bytes.count - 10] ^= 1
        try Files.writeAtomically(bytes, to: path)
        let journal = try open()
        #expect(try await journal.admit(call("t2", fence: 4)) == .stale)
        #expect(try await journal.admit(call("t3", fence: 4)) == .run)
    }

    /// Admitted at the same time, so that records are written together.
    private func admitMany() async throws {
        let journal = try open()
        try await withThrowingTaskGroup(of: Admission.self) { group in
            for number in 0..<200 { group.addTask { try await journal.admit(call("t\(number)", fence: 5)) } }
            for try await admission in group { #expect(admission == .run) }
        }
    }

    /// Where the lines begin that start a batch.
    private func batches(_ bytes: [UInt8]) -> [Int] {
        let starts =
            [0] + bytes.indices.filter { bytes[$0] == UInt8(ascii: "\n") && $0 + 1 < bytes.count }.map { $0 + 1 }
        return starts.filter { bytes[$0 + 16] == UInt8(ascii: " ") }
    }

    @Test func recordsWrittenTogetherAreAllKept() async throws {
        try await admitMany()
        #expect(batches(try Files.read(path)).count < 200)
        let journal = try open()
        for number in 0..<200 { #expect(try await journal.admit(call("t\(number)", fence: 4)) == .stale) }
    }

    @Test func lastBatchMayBeTornAnywhere() async throws {
        try await admitMany()
        let whole = try Files.read(path)
        let last = try #require(batches(whole).last)
        let lines = whole[last...].count { $0 == UInt8(ascii: "\n") }
        var torn = whole
        torn[last + 30] ^= 1
        try Files.writeAtomically(torn, to: path)
        let journal = try open()
        var known = 0
        for number in 0..<200 where try await journal.admit(call("t\(number)", fence: 4)) == .stale { known += 1 }
        #expect(known == 200 - lines)
    }

    @Test func damageBeforeTheLastBatchIsReported() async throws {
        try await admitMany()
        let journal = try open()
        _ = try await journal.admit(call("next", fence: 1))
        var bytes = try Files.read(path)
        bytes[30] ^= 1
        try Files.writeAtomically(bytes, to: path)
        #expect(throws: MigrationError.self) { try open() }
    }

    @Test func damageBeforeTheLastLineIsReported() async throws {
        do {
            let journal = try open()
            for number in 1...3 { _ = try await journal.admit(call("t\(number)", fence: 1)) }
        }
        var bytes = try Files.read(path)
        bytes[40] ^= 1
        try Files.writeAtomically(bytes, to: path)
        #expect { try open() } throws: {
            let error = $0 as? MigrationError
            return error?.code == .dataLoss && error?.message.contains("line 1") ?? false
        }
    }
}

/// A journal in use does not grow without end, and nothing that is of use is lost over that.
@Suite(.serialized) struct JournalHistoryTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private var path: String { "\(folder.path)/worker.journal" }

    /// One that is replaced again and again.
    private static func open(_ path: String) throws -> Journal {
        try Journal(
            path: path, answers: { _ in true }, growth: 2000,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }, cleanUp: { _, _ in })
    }

    private static func call(_ task: String, fence: UInt64 = 1) -> TaskCall {
        TaskCall(
            identity: CallIdentity(task: task, attempt: 1, fence: fence), method: "m", audience: "h", body: [1])
    }

    /// Takes a task on, ends it and, but for one in ten, forgets it.
    private static func pass(_ number: Int, _ journal: Journal) async throws {
        let call = call("t\(number)")
        _ = try await journal.admit(call)
        try await journal.recordEnd(
            of: call.identity, TaskEvent(call.identity, sequence: 2, .ended(.with { $0.message = "\(number)" })))
        if number % 10 != 0 { try await journal.acknowledge(task: "t\(number)", fence: 1) }
    }

    private func expectAll(_ count: Int) async throws {
        let journal = try Self.open(path)
        let kept = (0..<count).filter { $0 % 10 == 0 }.map { "t\($0)" }
        #expect(Set(await journal.unacknowledged().map(\.taskID)).isSuperset(of: kept))
        for number in 0..<count where number % 10 != 0 {
            #expect(try await journal.admit(Self.call("t\(number)")) == .stale, "t\(number) would run again")
        }
    }

    @Test func historyIsDroppedWhileTheJournalIsInUse() async throws {
        let journal = try Self.open(path)
        for number in 0..<100 { try await Self.pass(number, journal) }
        let entries = try JournalFile.read(path)
        // Three records were written of each.
        #expect(entries.count < 250)
        #expect(Set(entries.map(\.task)).count == 100)
        try await expectAll(100)
    }

    /// A hundred tasks over and over again: their fences change, the file's size doesn't.
    @Test func sizeIsThatOfWhatIsOfUse() async throws {
        let journal = try Self.open(path)
        for fence in 1...UInt64(50) {
            for number in 0..<10 { _ = try await journal.admit(Self.call("t\(number)", fence: fence)) }
        }
        #expect(try File(path, O_RDONLY).size < 8000)
        #expect(try await Self.open(path).admit(Self.call("t9", fence: 49)) == .stale)
    }

    @Test func whatCannotBeShortenedGoesOn() async throws {
        let journal = try Self.open(path)
        try Files.createDirectories("\(path).tmp")
        for number in 0..<50 { try await Self.pass(number, journal) }
        #expect(try JournalFile.read(path).count > 140)
        try Files.remove("\(path).tmp")
        for number in 50..<100 { try await Self.pass(number, journal) }
        #expect(try JournalFile.read(path).count < 250)
        try await expectAll(100)
    }

    /// What was told is known to the next process, wherever a replacement was interrupted.
    @Test(arguments: [Failpoint.workerJournalWritten, .workerJournalReplaced], [2, 3, 5])
    func killedWhileItIsReplaced(_ point: Failpoint, _ time: Int) async throws {
        let told = "\(folder.path)/told"
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [path = path as String, told = told as String, point = "\(point.rawValue):\(time)" as String] in
            setenv(Failpoint.environmentKey, point, 1)
            let journal = try JournalHistoryTests.open(path)
            for number in 0..<1000 {
                try await JournalHistoryTests.pass(number, journal)
                try Files.writeAtomically(Array("\(number + 1)".utf8), to: told)
            }
        }
        let count = try #require(Int(String(decoding: try Files.read(told), as: UTF8.self)))
        #expect(count > 0)
        try await expectAll(count)
    }
}

@Suite struct WorkDirectoryTests {
    @Test func newerFenceTakesOverAndOlderIsRefused() throws {
        let folder = try TemporaryFolder()
        let work = WorkDirectory(pool: folder.path, task: "m-convert")
        let first = try work.adopt(fence: 1)
        try Files.writeAtomically([1], to: "\(first)/disk0.partial")
        let third = try work.adopt(fence: 3)
        #expect(try Files.read("\(third)/disk0.partial") == [1])
        #expect(!Files.exists(first))
        #expect { try work.adopt(fence: 2) } throws: { ($0 as? MigrationError)?.code == .aborted }
        #expect(try work.adopt(fence: 3) == third)
    }

    @Test(arguments: ["", ".", "..", "../..", "/", "a/../../x"]) func nothingButATaskIsRemoved(_ task: String) throws {
        let folder = try TemporaryFolder()
        _ = try WorkDirectory(pool: folder.path, task: "a").adopt(fence: 1)
        #expect { try WorkDirectory(pool: folder.path, task: task).remove() } throws: {
            ($0 as? MigrationError)?.code == .invalidArgument
        }
        #expect(Files.exists("\(folder.path)/.flotilla/a/1"))
    }

    @Test func removingTheLastTaskRemovesTheFolder() throws {
        let folder = try TemporaryFolder()
        let (one, two) = (WorkDirectory(pool: folder.path, task: "a"), WorkDirectory(pool: folder.path, task: "b"))
        _ = try one.adopt(fence: 1)
        _ = try two.adopt(fence: 1)
        try one.remove()
        #expect(try Files.list(folder.path) == [".flotilla"])
        try two.remove()
        #expect(try Files.list(folder.path).isEmpty)
        try two.remove()
    }
}
