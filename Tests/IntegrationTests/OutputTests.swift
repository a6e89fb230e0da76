import FlotillaProtocol
import HostKit
import SwiftProtobuf
import TestKit
import Testing

extension Integration {
    /// libvirt's test driver: no guest runs, so this is quick.
    @Suite(.serialized) struct Output {
        private func migrate(_ options: [String], in earlier: Place? = nil) throws -> (Outcome, Place) {
            let place = try earlier ?? Place(uri: "test:///default")
            let outcome = try run(
                Environment.flotilla(),
                ["migrate", try web(), "--host", place.uri, "--pool", place.pool, "--state", place.state]
                    + ["--network", "VM Network=network:default", "--network", "Storage Network=network:default"]
                    + options)
            return (outcome, place)
        }

        @Test func linesWhenPiped() throws {
            let (outcome, place) = try migrate([])
            #expect(outcome.status == 0, "\(outcome.errors)")
            #expect(!outcome.output.contains("\u{1B}"))
            for part in ["demo-web: done", "demo-web-disk0.qcow2", "disk1 content  sha256:", "stage", "deploy"] {
                #expect(outcome.output.contains(part), "\(part) in \(outcome.output)")
            }
            try place.expectDisks("demo-web")
            let names = try Files.list("\(place.state)/manifests")
            func manifest() throws -> Manifest {
                let json = try Files.read("\(place.state)/manifests/\(try #require(names.first))")
                return try Manifest(jsonUTF8Bytes: json)
            }
            let first = try manifest()
            #expect(names.count == 1 && first.schemaVersion == 1)
            for disk in first.disks {
                #expect(
                    outcome.output.contains(disk.source.contentSha256) && outcome.output.contains(disk.source.sha256))
                #expect(disk.source.contentSha256.count == 64 && disk.target.path.hasPrefix(place.pool))
            }
            // A look at what is done doesn't make its record poorer.
            #expect(try migrate([], in: place).0.status == 0)
            #expect(try manifest().disks == first.disks)
        }

        @Test func deadlineStopsIt() throws {
            for refused in ["0h", "-1h", "soon", "1999-12-31T23:59:59Z", "9223372036854775807d"] {
                #expect(try migrate(["--deadline", refused]).0.status == 2)
            }
            let (late, place) = try migrate(["--rate", "512K", "--deadline", "2s"])
            #expect(late.status == 1, "\(late.output)")
            for part in ["deadline", "ask for it again with a later deadline"] {
                #expect((late.output + late.errors).contains(part), "\(part) in \(late.output)")
            }
            #expect(try place.poolFiles.allSatisfy { !$0.hasSuffix(".qcow2") })
            let (done, _) = try migrate(["--deadline", "1h"], in: place)
            #expect(done.status == 0, "\(done.output)")
            try place.expectDisks("demo-web")
        }

        @Test func oneObjectPerEvent() throws {
            let (outcome, _) = try migrate(["--json"])
            #expect(outcome.status == 0)
            let events = try events(outcome)
            #expect(events.contains { $0.progress.progress.subject == "disk0" && $0.progress.progress.bytesTotal > 0 })
            #expect(events.contains { !$0.step.step.message.isEmpty })
            let last = try #require(events.last)
            #expect(last.state.state == .done)
            #expect(last.state.manifest.disks.count == 2)
        }

        /// Letters of two columns and marks of none: a line that wraps would be wiped at the wrong place.
        @Test(arguments: [String(repeating: "机器学习", count: 7), "e\u{301}n", String(repeating: "n", count: 100)])
        func theBarKeepsToItsLine(_ name: String) throws {
            let folder = try TemporaryFolder("work")
            let (path, target) = ("\(folder.path)/work/disk.raw", "\(folder.path)/work/\(name).qcow2")
            try Files.writeAtomically([UInt8](repeating: 7, count: 8 << 20), to: path)
            let convert = "'\(try Environment.flotilla())' disk convert -f raw '\(path)' '\(target)'"
            let outcome = try run(
                "/usr/bin/script", ["-qec", "stty cols 60; \(convert)", "/dev/null"], environment: ["TERM": "xterm"])
            #expect(outcome.status == 0, "\(outcome.output)")
            let wipe = "\u{1B}[2K"
            let bars = outcome.output.split(whereSeparator: \.isNewline).filter { $0.hasPrefix(wipe) }
            #expect(!bars.isEmpty)
            for bar in bars {
                let wide = bar.filter { $0.unicodeScalars.contains { $0.value > 0x2E80 } }
                #expect(bar.count - wipe.count + wide.count < 60, "\(bar)")
            }
        }

        @Test func barOnATerminal() throws {
            let place = try Place(uri: "test:///default")
            let command = [
                try Environment.flotilla(), "migrate", try web(), "--host", place.uri, "--pool", place.pool, "--state",
                place.state, "--network", "'VM Network=network:default'", "--network",
                "'Storage Network=network:default'",
            ].joined(separator: " ")
            let outcome = try run(
                "/usr/bin/script", ["-qec", command, "/dev/null"], environment: ["TERM": "xterm"])
            #expect(outcome.status == 0, "\(outcome.output)")
            for part in ["demo-web disk0 [", "100%", "/s", "256 MiB of 256 MiB"] {
                #expect(outcome.output.contains(part), "\(part) in \(outcome.output)")
            }
        }

        @Test func rawDisks() throws {
            let (outcome, place) = try migrate(["--format", "raw"])
            #expect(outcome.status == 0)
            try place.expectDisks("demo-web", format: "raw")
        }
    }
}
