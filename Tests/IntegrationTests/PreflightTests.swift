import FlotillaProtocol
import HostKit
import TestKit
import Testing

extension Integration {
    /// What must be found before anything is converted.
    @Suite(.serialized) struct Preflight {
        @Test func requiredGPUThatTheHostLacksBlocks() throws {
            let place = try Place()
            let outcome = try place.migrate(try gpuVM(), options: ["--gpu", "require"])
            #expect(outcome.status == 3)
            #expect(outcome.output.contains("BLOCKED"))
            #expect(outcome.output.contains("IOMMU") || outcome.output.contains("10de:"))
            #expect(try place.poolFiles.isEmpty)
            #expect(try place.domains.isEmpty)
        }

        @Test func unmappedNetworkBlocks() throws {
            let place = try Place()
            let outcome = try run(
                Environment.flotilla(),
                ["migrate", try web(), "--host", place.uri, "--pool", place.pool, "--state", place.state])
            #expect(outcome.status == 3)
            #expect(outcome.output.contains("VM Network"))
            #expect(try place.poolFiles.isEmpty)
        }

        @Test func foreignDomainOfThatNameIsRefusedAndUntouched() throws {
            let place = try Place()
            defer { try? place.clear() }
            let xml = "\(place.folder.path)/foreign.xml"
            let text =
                "<domain type='qemu'><name>demo-web</name><memory>65536</memory><os><type>hvm</type></os></domain>"
            try Files.writeAtomically(Array(text.utf8), to: xml)
            #expect(try place.virsh("define", xml).status == 0)
            let before = try place.virsh("dumpxml", "demo-web").output
            let outcome = try place.migrate(try web())
            #expect(outcome.status == 3)
            #expect(outcome.output.contains("not this migration's"))
            #expect(try place.virsh("dumpxml", "demo-web").output == before)
            #expect(try place.poolFiles.isEmpty)
        }

        @Test func readOnlyPoolBlocks() throws {
            let place = try Place()
            try require("mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", place.pool)
            defer { _ = try? run("/usr/bin/umount", [place.pool]) }
            let outcome = try place.migrate(try web())
            #expect(outcome.status == 3)
            #expect(outcome.output.contains(place.pool) && outcome.output.contains("can't be used"))
        }

        @Test func missingPoolBlocks() throws {
            let place = try Place()
            try Files.remove(place.pool)
            let outcome = try place.migrate(try web())
            #expect(outcome.status == 3)
            #expect(outcome.output.contains(place.pool))
            #expect(!Files.exists(place.pool))
        }

        @Test func dryRunSaysItAllAndChangesNothing() throws {
            let place = try Place()
            let outcome = try place.migrate(try gpuVM(), options: ["--gpu", "drop", "--dry-run"])
            #expect(outcome.status == 0, "\(outcome.errors)")
            for part in [
                "<domain type=\"qemu\"", "\(place.pool)/demo-gpu-disk0.qcow2", "nothing was changed", "left out",
            ] {
                #expect(outcome.output.contains(part), "\(part) in \(outcome.output)")
            }
            #expect(try place.poolFiles.isEmpty)
            #expect(try place.domains.isEmpty)
            #expect(!Files.exists(place.state))
        }

        @Test func unreachableLibvirtMeansTryAgain() throws {
            let place = try Place(uri: "qemu:///system?socket=/nowhere/libvirt-sock")
            let outcome = try place.migrate(try web())
            #expect(outcome.status == 75)
            #expect(outcome.errors.contains("/nowhere/libvirt-sock"))
        }

        @Test func stateFolderBelongsToOneProcess() throws {
            let place = try Place()
            try Files.createDirectories(place.state)
            let outcome = try run(
                "/usr/bin/flock",
                [
                    "\(place.state)/lock", try Environment.flotilla(), "migrate", try web(), "--host", place.uri,
                    "--pool", place.pool, "--state", place.state,
                ])
            #expect(outcome.status == 75)
            #expect(outcome.errors.contains(place.state))
        }

        @Test(arguments: [
            ["migrate"], ["migrate", "web.ova", "--pool", "/tmp"],
            ["migrate", "ova:x", "--pool", "/tmp", "--format", "vhd"],
            ["migrate", "ova:x", "--pool", "/tmp", "--network", "nonsense"],
            ["migrate", "ova:x", "--pool", "/tmp", "--verify", "agent"],
            ["migrate", "ova:x", "--pool", "/tmp", "--start", "--verify", "console=("], ["explode"],
        ])
        func wrongUsageExitsWith2(_ arguments: [String]) throws {
            let outcome = try run(Environment.flotilla(), arguments)
            #expect(outcome.status == 2)
            #expect(!outcome.errors.isEmpty)
        }

        @Test(arguments: ["bash", "zsh", "fish"]) func completions(_ shell: String) throws {
            let outcome = try run(Environment.flotilla(), ["--generate-completion-script", shell])
            #expect(outcome.status == 0 && outcome.output.contains("migrate"))
        }
    }
}
