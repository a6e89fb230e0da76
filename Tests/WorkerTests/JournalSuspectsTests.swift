import Messaging
import MigrationModel
import Testing

@testable import Worker

extension JournalTests {
    /// What waited for its turn, or was stopped in order, did not end the process.
    @Test func whatMayHaveEndedTheProcessIsSuspect() async throws {
        do {
            // A process before the last one: whatever is left of it is old news.
            let journal = try open()
            for task in ["old-export", "a-convert"] { _ = try await journal.admit(call(task, fence: 1)) }
        }
        do {
            let journal = try open()
            for task in ["a-convert", "b-export", "c-convert", "d-deploy", "e-undeploy", "f-deploy", "g-convert"] {
                _ = try await journal.admit(call(task, fence: 2))
            }
            try await journal.recordEnd(of: call("a-convert", fence: 2).identity, end(call("a-convert", fence: 2)))
            try await journal.recordStop(of: call("b-export", fence: 2).identity)
            // An attempt that the journal does not know.
            try await journal.recordStop(of: call("c-convert", fence: 1).identity)
        }
        let journal = try open()
        #expect(journal.interrupted.count == 7)
        #expect(journal.suspects(slots: 1) == ["c-convert", "d-deploy"])
        #expect(journal.suspects(slots: 2) == ["c-convert", "g-convert", "d-deploy", "e-undeploy"])
        // Nothing was taken on since.
        #expect(try open().suspects(slots: 1) == ["c-convert", "d-deploy"])
    }
}
