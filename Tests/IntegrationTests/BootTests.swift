import FlotillaProtocol
import HostKit
import SwiftProtobuf
import Testing

extension Integration {
    @Suite(.serialized) struct Boot {
        /// The product in one test: an EFI guest from an OVA and a BIOS guest from a VMX boot on QEMU and say so.
        @Test func bothGuestsBootAndProveIt() throws {
            let place = try Place()
            defer { try? place.clear() }
            let options = ["--gpu", "drop", "--start", "--verify", "console=FLOTILLA-GUEST-OK.*", "--json"]
            let outcome = try place.migrate(try web(), try gpuVM(), options: options)
            #expect(outcome.status == 0, "\(outcome.errors)")
            let ended = try events(outcome).compactMap { $0.state.state == .done ? $0.state : nil }
            #expect(Set(ended.map(\.manifest.vm.name)) == ["demo-web", "demo-gpu"])
            for migration in ended {
                #expect(migration.result.proof.contains("FLOTILLA-GUEST-OK vm=\(migration.manifest.vm.name)"))
                #expect(migration.result.proof.contains("disks=vda,vdb data=sha256-ok"))
                #expect(migration.result.domainState == "running")
                for nic in migration.manifest.nics { #expect(migration.result.proof.contains(nic.mac)) }
                for disk in migration.manifest.disks {
                    #expect(disk.source.sha256.count == 64 && disk.source.contentSha256.count == 64)
                }
            }
            let gpu = try #require(ended.first { $0.manifest.vm.name == "demo-gpu" })
            #expect(gpu.manifest.gpus.first?.passthrough.id.vendor == 0x10de)
            #expect(gpu.findings.contains { $0.subject == "gpu0" && $0.severity == .warning })
            #expect(try place.domains.sorted() == ["demo-gpu", "demo-web"])

            // Again: nothing is done twice, and it is quick.
            let again = try place.migrate(try web(), try gpuVM(), options: options)
            #expect(again.status == 0)
            #expect(again.seconds < 10)
            #expect(try events(again).allSatisfy { !$0.isProgress })
            let xml = try place.virsh("dumpxml", "demo-web").output
            for part in ["00:50:56:9a:10:01", "pc-q35", "flotilla:migration", "bus='virtio'"] {
                #expect(xml.contains(part))
            }
        }
    }
}
