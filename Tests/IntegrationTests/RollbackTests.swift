import FlotillaProtocol
import HostKit
import Testing

extension Integration {
    /// `flotilla migrate … --rollback`: no domain, the disks and the source as they were.
    @Suite(.serialized) struct Rollback {
        @Test func doneThenTakenBackThenDoneAgain() throws {
            let place = try Place()
            defer { try? place.clear() }
            let source = String(try web().dropFirst(4))
            let before = try require("sha256sum", source)
            #expect(try place.migrate(try web(), options: ["--start"]).status == 0)
            let planned = try place.migrate(try web(), options: ["--rollback", "--dry-run"])
            #expect(planned.status == 0 && planned.output.contains("undefine domain demo-web"), "\(planned)")
            #expect(try place.virsh("domstate", "demo-web").output.contains("running"))

            let killed = try place.migrate(
                try web(), options: ["--rollback", "--force"], failpoint: Failpoint.deployUndefined.rawValue)
            #expect(killed.status == -9, "\(killed)")
            let back = try place.migrate(try web(), options: ["--rollback", "--force"])
            #expect(back.status == 0 && back.output.contains("rolled back: no domain"), "\(back)")
            #expect(try place.domains.isEmpty && place.poolFiles == webDisks)
            #expect(try require("sha256sum", source) == before)

            #expect(try place.migrate(try web()).status == 0)
            #expect(try place.domains == ["demo-web"])
            try place.expectNoLeftovers(webDisks)
        }

        @Test func whatFailsItsProofIsTakenBack() throws {
            let place = try Place()
            defer { try? place.clear() }
            let proof = ["--start", "--verify", "console=never", "--verify-timeout", "3"]
            let failed = try place.migrate(try web(), options: proof)
            #expect(failed.status == 1 && failed.output.contains("demo-web was undefined again"), "\(failed)")
            #expect(try place.domains.isEmpty && place.poolFiles == webDisks)
        }

        /// One that is not known among several: none is taken back.
        @Test func unknownSourceTakesNothingBack() throws {
            let place = try Place()
            defer { try? place.clear() }
            #expect(try place.migrate(try web()).status == 0)
            let outcome = try place.migrate(try web(), try gpuVM(), options: ["--rollback", "--force"])
            #expect(outcome.status == 1 && outcome.errors.contains("was not migrated to"), "\(outcome)")
            #expect(try place.domains == ["demo-web"])
        }

        @Test func whatWasNeverMigratedIsNotTakenBack() throws {
            let place = try Place()
            let outcome = try place.migrate(try web(), options: ["--rollback"])
            #expect(outcome.status == 1 && outcome.errors.contains("has no migrations"), "\(outcome)")
            #expect(!Files.exists(place.state))
            #expect(try place.migrate(try web(), options: ["--force"]).status == 2)
        }
    }
}
