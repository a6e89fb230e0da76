import FlotillaProtocol
import Foundation
import HostKit
import SwiftProtobuf
import TestKit
import Testing

extension Integration {
    @Suite struct Assess {
        private let folder: TemporaryFolder

        init() throws { folder = try TemporaryFolder("vms") }

        /// A VM with this device; the host has an A100 and room for a vGPU of another GPU.
        private func prepare(_ device: (inout AssignedDevice) -> Void) throws {
            let manifest = Manifest.with {
                $0.schemaVersion = 1
                $0.vm = .with {
                    ($0.name, $0.firmware, $0.powerState) = ("web", .bios, .poweredOff)
                    $0.cpu = .with { ($0.count, $0.coresPerSocket) = (1, 1) }
                    $0.memory.bytes = 1 << 30
                }
                $0.gpus = [
                    .with {
                        ($0.id, $0.classCode) = ("gpu0", 0x0302)
                        device(&$0)
                    }
                ]
            }
            try Files.writeAtomically(manifest.jsonUTF8Bytes(), to: "\(folder.path)/vms/web.json")
            let host = HostProfile.with {
                ($0.name, $0.cpus, $0.memoryBytes) = ("kvm1", 16, 64 << 30)
                ($0.iommuEnabled, $0.vfioAvailable) = (true, true)
                $0.pools = [
                    .with { ($0.name, $0.path, $0.freeBytes, $0.writable) = ("images", "/images", 1 << 40, true) }
                ]
                $0.pciFunctions = [
                    .with {
                        ($0.address, $0.classCode, $0.iommuGroup, $0.driver) = ("0000:3b:00.0", 0x0302, 7, "nvidia")
                        $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) }
                    },
                    .with {
                        ($0.address, $0.classCode, $0.iommuGroup, $0.driver) = ("0000:af:00.0", 0x0302, 8, "nvidia")
                        $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x1eb8) }
                        $0.vgpuTypes = [.with { ($0.id, $0.name, $0.available) = ("nvidia-222", "GRID T4-4Q", 4) }]
                    },
                ]
            }
            try Files.writeAtomically(host.jsonUTF8Bytes(), to: "\(folder.path)/kvm1.json")
        }

        private func assess(_ more: String...) throws -> (vm: [String: Any], demand: [String: Any], text: String) {
            let command = ["assess", "manifest:\(folder.path)/vms", "--hosts", "\(folder.path)/kvm1.json"] + more
            let json = try run(Environment.flotilla(), command + ["--json"])
            try #require(json.status == 0, "\(json.errors)")
            let root = try #require(try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [String: Any])
            let vms = try #require(root["vms"] as? [[String: Any]])
            let demand = try #require(root["demand"] as? [[String: Any]])
            return (
                try #require(vms.first), try #require(demand.first), try run(Environment.flotilla(), command).output
            )
        }

        /// Id to id, profile to profile, a whole GPU to a vGPU and back: each is blocked without its mapping.
        @Test(arguments: [
            ("10de:2204", "10de:20b5", 1), ("grid_a40-4q", "T4-4Q", 4), ("10de:2204", "GRID T4-4Q", 4),
            ("grid_a40-4q", "10de:20b5", 1),
        ])
        func mappedGPUs(_ source: String, _ target: String, _ free: Int) throws {
            try prepare {
                if source.hasPrefix("10de:") {
                    $0.passthrough.id = .with { ($0.vendor, $0.device) = (0x10de, 0x2204) }
                } else {
                    $0.vgpu.profile = source
                }
            }
            let without = try assess()
            #expect(without.vm["verdict"] as? String == "blocked" && without.demand["kind"] as? String == source)
            let found = try assess("--gpu-map", "\(source)=\(target)")
            #expect(found.vm["verdict"] as? String == "ready", "\(found.vm)")
            #expect(found.vm["hosts"] as? [String] == ["kvm1"])
            #expect(found.demand["kind"] as? String == target && found.demand["free"] as? Int == free)
            #expect(found.text.contains("\(source) as \(target)"), "\(found.text)")
        }

        @Test(arguments: ["10de:2204", "10de:2204=", "=T4-4Q", "a=b", "10de:22041=T4-4Q"])
        func aMappingThatIsNone(_ argument: String) throws {
            let outcome = try run(
                Environment.flotilla(), ["assess", "manifest:\(folder.path)/vms", "--gpu-map", argument])
            #expect(outcome.status == 2 && outcome.errors.contains("--gpu-map"), "\(outcome.errors)")
        }
    }
}
