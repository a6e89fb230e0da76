import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Testing

extension Integration {
    /// Kill -9 anywhere, run the same command again: one domain, correct disks, no leftovers.
    @Suite(.serialized) struct Crash {
        @Test(arguments: Failpoint.allCases.filter { !["gpu.", "undeploy."].contains(where: $0.rawValue.hasPrefix) })
        func killedAtFailpointThenRunAgain(_ failpoint: Failpoint) throws {
            let place = try Place()
            defer { try? place.clear() }
            // Only a started domain passes the last one.
            let options = failpoint == .deployStarted ? ["--start"] : []
            let killed = try place.migrate(try web(), options: options, failpoint: failpoint.rawValue)
            #expect(killed.status == -9, "\(failpoint) was not reached: \(killed.output)\(killed.errors)")
            let again = try place.migrate(try web(), options: options)
            #expect(again.status == 0, "\(again.output)\(again.errors)")
            #expect(try place.domains == ["demo-web"])
            _ = try place.virsh("destroy", "demo-web")
            if failpoint != .deployStarted { try place.expectDisks("demo-web") }
            try place.expectNoLeftovers(webDisks)
        }

        /// The same failpoints with the death late in their course: after several chunks and checkpoints.
        @Test(arguments: ["convert.chunk-written:9", "convert.checkpoint:2", "worker.result-published:2"])
        func killedLater(_ failpoint: String) throws {
            let place = try Place()
            defer { try? place.clear() }
            let killed = try place.migrate(try web(), failpoint: failpoint)
            #expect(killed.status == -9, "\(killed.output)\(killed.errors)")
            let again = try place.migrate(try web())
            #expect(again.status == 0, "\(again.output)\(again.errors)")
            try place.expectDisks("demo-web")
            try place.expectNoLeftovers(webDisks)
        }

        /// Killed again and again at whatever moment: the pool never shows a final name with partial content.
        @Test func killedAtRandomMoments() throws {
            let place = try Place()
            defer { try? place.clear() }
            var random = SystemRandomNumberGenerator()
            for _ in 0..<8 {
                let delay = Double(Int.random(in: 20...900, using: &random)) / 1000
                _ = try place.migrate(try web(), killAfter: delay)
                for name in try place.poolFiles where name.hasSuffix(".qcow2") {
                    try require("qemu-img", "check", "-q", "\(place.pool)/\(name)")
                }
            }
            let last = try place.migrate(try web())
            #expect(last.status == 0, "\(last.output)\(last.errors)")
            #expect(try place.domains == ["demo-web"])
            try place.expectDisks("demo-web")
            try place.expectNoLeftovers(webDisks)
        }

        /// Ctrl-C at any moment: it says so, exits with 4 (or had ended), and the next run continues.
        @Test(arguments: [SIGINT, SIGTERM]) func interruptedThenRunAgain(_ signal: Int32) throws {
            let place = try Place()
            defer { try? place.clear() }
            for delay in [0.02, 0.05, 0.1, 0.2, 0.3, 0.5] {
                let outcome = try place.migrate(try web(), killAfter: delay, signal: signal)
                // Before its first line of our code runs, the signal's own default counts.
                #expect([0, 4, -signal].contains(outcome.status), "\(outcome.output)\(outcome.errors)")
                if outcome.status == 4 { #expect(outcome.errors.contains("run the same command again")) }
            }
            let waiting = try place.migrate(
                try web(), options: ["--start", "--verify", "console=never", "--name", "demo-two", "--new-uuid"],
                killAfter: 4,
                signal: signal)
            #expect(waiting.status == 4, "\(waiting.output)\(waiting.errors)")
            let last = try place.migrate(try web())
            #expect(last.status == 0, "\(last.output)\(last.errors)")
            #expect(try place.domains == ["demo-two", "demo-web"])
        }

        @Test func checkpointIsUsedAfterAKill() throws {
            let place = try Place()
            defer { try? place.clear() }
            let killed = try place.migrate(try web(), failpoint: "convert.checkpoint:1")
            #expect(killed.status == -9)
            let json = try place.migrate(try web(), options: ["--json"])
            #expect(json.status == 0)
            #expect(try events(json).contains { $0.step.step.message.contains("continued from its checkpoint") })
        }
    }
}
