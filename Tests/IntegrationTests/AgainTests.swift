import FlotillaProtocol
import Foundation
import HostKit
import TestKit
import Testing

extension Integration {
    /// The same command, or nearly the same, run again.
    @Suite(.serialized) struct Again {
        private func done(_ outcome: Outcome, sourceLocation: SourceLocation = #_sourceLocation) throws -> Migration {
            #expect(outcome.status == 0, "\(outcome.output)\(outcome.errors)", sourceLocation: sourceLocation)
            return try #require(try events(outcome).last?.state, sourceLocation: sourceLocation)
        }

        @Test func otherPathToTheSameSourceIsTheSameMigration() throws {
            let place = try Place()
            defer { try? place.clear() }
            let first = try done(place.migrate(try web(), options: ["--json"]))
            let link = "\(place.folder.path)/link.ova"
            try require("ln", "-s", "\(try Environment.guests())/demo-web.ova", link)
            #expect(try done(place.migrate("ova:\(link)", options: ["--json"])).id == first.id)
        }

        @Test func ovfFolder() throws {
            let place = try Place()
            defer { try? place.clear() }
            let folder = try place.folder.sub("ovf")
            try require("tar", "-xf", "\(try Environment.guests())/demo-web.ova", "-C", folder)
            let ovf = try #require(try Files.list(folder).first { $0.hasSuffix(".ovf") })
            _ = try done(place.migrate("ovf:\(folder)/\(ovf)", options: ["--json"]))
            try place.expectDisks("demo-web")
        }

        @Test func changedOptionsOfAnInterruptedRunCount() throws {
            let place = try Place()
            defer { try? place.clear() }
            #expect(try place.migrate(try web(), failpoint: "convert.checkpoint").status == -9)
            _ = try done(place.migrate(try web(), options: ["--format", "raw", "--json"]))
            try place.expectDisks("demo-web", format: "raw")
            try place.expectNoLeftovers(["demo-web-disk0.raw", "demo-web-disk1.raw"])
        }

        @Test func otherOptionsDontTouchWhatIsDone() throws {
            let place = try Place()
            defer { try? place.clear() }
            _ = try done(place.migrate(try web(), options: ["--json"]))
            let again = try done(place.migrate(try web(), options: ["--format", "raw", "--json"]))
            #expect(again.findings.contains { $0.message.contains("other options") })
            try place.expectNoLeftovers(webDisks)
        }

        @Test func lostDiskIsNotDone() throws {
            let place = try Place()
            defer { try? place.clear() }
            _ = try done(place.migrate(try web(), options: ["--json"]))
            try Files.remove("\(place.pool)/demo-web-disk1.qcow2")
            let again = try place.migrate(try web())
            #expect(again.status == 1)
            #expect(again.output.contains("demo-web-disk1.qcow2"))

            // With the rest removed as the message says, it is migrated anew.
            try place.clear()
            try Files.remove("\(place.pool)/demo-web-disk0.qcow2")
            _ = try done(place.migrate(try web(), options: ["--json"]))
            try place.expectDisks("demo-web")
            #expect(try place.domains == ["demo-web"])
        }

        @Test func undefinedDomainIsDefinedAgainWithItsDisks() throws {
            let place = try Place()
            defer { try? place.clear() }
            _ = try done(place.migrate(try web(), options: ["--json"]))
            let before = try File("\(place.pool)/demo-web-disk0.qcow2", O_RDONLY).status().st_ino
            try place.clear()
            _ = try done(place.migrate(try web(), options: ["--json"]))
            #expect(try place.domains == ["demo-web"])
            #expect(try File("\(place.pool)/demo-web-disk0.qcow2", O_RDONLY).status().st_ino == before)
        }

        @Test func changedSourceIsNotDone() throws {
            let place = try Place()
            defer { try? place.clear() }
            let copy = "\(place.folder.path)/copy.ova"
            try require("cp", "\(try Environment.guests())/demo-web.ova", copy)
            _ = try done(place.migrate("ova:\(copy)", options: ["--json"]))
            try require("touch", copy)
            let again = try place.migrate("ova:\(copy)")
            #expect(again.status == 1)
            #expect(again.output.contains("changed"))
        }

        /// What another command left unfinished in the same state folder is not this one's to touch.
        @Test func otherPoolsWorkIsLeftAlone() throws {
            let place = try Place()
            defer { try? place.clear() }
            #expect(
                try place.migrate(try gpuVM(), options: ["--gpu", "drop"], failpoint: "convert.disk-published").status
                    == -9)
            let other = try place.folder.sub("other")
            let outcome = try place.migrate(try web(), options: ["--pool", other])
            #expect(outcome.status == 0, "\(outcome.output)\(outcome.errors)")
            #expect(try place.domains == ["demo-web"])
            #expect(try Files.list(other) == webDisks)
            let resumed = try place.migrate(try gpuVM(), options: ["--gpu", "drop"])
            #expect(resumed.status == 0, "\(resumed.output)\(resumed.errors)")
            try place.expectDisks("demo-gpu")
            #expect(try Files.list(place.pool) == ["demo-gpu-disk0.qcow2", "demo-gpu-disk1.qcow2"])
        }

        @Test func fullStateFolderMeansTryAgain() throws {
            let place = try Place()
            defer { try? place.clear() }
            try Files.createDirectories(place.state)
            try require("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place.state)
            defer { _ = try? run("/usr/bin/umount", [place.state]) }
            let full = try place.migrate(try web())
            #expect(full.status == 75, "\(full.output)\(full.errors)")
            #expect(full.seconds < 30, "it waited for something that could not come")
            try require("mount", "-o", "remount,size=64m", place.state)
            let again = try place.migrate(try web())
            #expect(again.status == 0, "\(again.output)\(again.errors)")
        }

        @Test func manifestThatNoMessageHoldsIsAnErrorNotAHang() throws {
            let place = try Place()
            defer { try? place.clear() }
            let folder = try place.folder.sub("ovf")
            try require("tar", "-xf", "\(try Environment.guests())/demo-web.ova", "-C", folder)
            let ovf = try #require(try Files.list(folder).first { $0.hasSuffix(".ovf") })
            let text = String(decoding: try Files.read("\(folder)/\(ovf)"), as: UTF8.self)
                .replacing(#/<Annotation>.*</Annotation>/#, with: "")
                .replacingOccurrences(
                    of: "<VirtualHardwareSection>",
                    with: "<AnnotationSection><Info>long</Info><Annotation>"
                        + String(repeating: "words ", count: 200_000)
                        + "</Annotation></AnnotationSection><VirtualHardwareSection>")
            try Files.writeAtomically(Array(text.utf8), to: "\(folder)/\(ovf)")
            for name in try Files.list(folder) where name.hasSuffix(".mf") { try Files.remove("\(folder)/\(name)") }
            let outcome = try place.migrate("ovf:\(folder)/\(ovf)")
            #expect([1, 75].contains(outcome.status), "\(outcome.output)\(outcome.errors)")
            #expect((outcome.output + outcome.errors).contains("bytes"))
            // And it blocks nobody else.
            #expect(try place.migrate(try gpuVM(), options: ["--gpu", "drop"]).status == 0)
        }
    }
}
