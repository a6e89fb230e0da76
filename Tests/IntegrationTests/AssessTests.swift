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

        private func report(_ source: String) throws -> [String: [String: Any]] {
            let found = try run(Environment.flotilla(), ["assess", source, "--json"])
            try #require(found.status == 0, "\(found.errors)")
            let root = try #require(try JSONSerialization.jsonObject(with: Data(found.output.utf8)) as? [String: Any])
            let vms = try #require(root["vms"] as? [[String: Any]])
            return Dictionary(vms.map { ($0["name"] as? String ?? "", $0) }, uniquingKeysWith: { first, _ in first })
        }

        /// Neither a file that is no manifest hides the others, nor one whose disks are elsewhere has disks of no size.
        @Test func aFolderIsJudgedFileByFile() throws {
            try prepare { $0.vgpu.profile = "grid_t4-4q" }
            let vms = "\(folder.path)/vms"
            try Files.writeAtomically(Array("vm: [1\u{1B}".utf8), to: "\(vms)/bad.yaml")
            func hyper(_ name: String, _ path: String, _ bytes: Int) throws {
                let text = """
                    {"manifest_version": "1.0", "source": {"vm_name": "\(name)"}, "vm": {"cpu": 1, "mem_gb": 1},
                    "disks": [{"id": "d0", "source_format": "raw", "bytes": \(bytes), "local_path": "\(path)"}]}
                    """
                try Files.writeAtomically(Array(text.utf8), to: "\(vms)/\(name).json")
            }
            try hyper("here", "here.raw", 1024)
            try hyper("there", "/nowhere/there.raw", 4096)
            try Files.writeAtomically([UInt8](repeating: 0, count: 1024), to: "\(vms)/here.raw")
            let found = try report("manifest:\(vms)")
            #expect(found.count == 4 && found["manifest:\(vms)/bad.yaml"]?["verdict"] as? String == "blocked")
            #expect(found["here"]?["diskBytes"] as? [Int] == [1024] && found["there"]?["diskBytes"] as? [Int] == [4096])
            let reasons = try #require(found["there"]?["reasons"] as? [[String: Any]])
            #expect(reasons.contains { ($0["message"] as? String ?? "").contains("its size is not known") })
        }

        /// Names repeat on a server; the table tells where each is, in columns that fit every script.
        @Test func machinesAreToldApart() throws {
            try prepare { $0.vgpu.profile = "grid_t4-4q" }
            let path = "\(folder.path)/vms/web.json"
            var manifest = try Manifest(jsonUTF8Bytes: Files.read(path))
            for (name, place) in [("web", "DC1"), ("机器学习", "DC2"), ("a\u{202E}b", "DC2")] {
                manifest.vm.name = name
                manifest.vm.folder = "prod"
                manifest.source = .with { ($0.vmMoid, $0.datacenter, $0.hostName) = ("vm-7", place, "esx1") }
                try Files.writeAtomically(manifest.jsonUTF8Bytes(), to: "\(folder.path)/vms/\(place)\(name.count).json")
            }
            try Files.remove(path)
            let vm = try #require(try report("manifest:\(folder.path)/vms")["web"])
            for (key, value) in [("id", "vm-7"), ("datacenter", "DC1"), ("folder", "prod"), ("sourceHost", "esx1")] {
                #expect(vm[key] as? String == value)
            }
            let text = try run(Environment.flotilla(), ["assess", "manifest:\(folder.path)/vms"]).output
            #expect(text.contains(" web       DC1 ") && text.contains(" 机器学习  DC2 "), "\(text)")
            #expect(text.contains("3 VMs:") && !text.contains("\u{202E}") && text.contains("web (DC1)"))
        }

        @Test(arguments: [
            (["assess", "vsphere://me@localhost:1/?vm=a", "--vm", "b"], "another VM"),
            (["inventory", "vsphere://me@localhost:1/", "--vm", ""], "names no VM"),
            (["migrate", "vsphere://me@localhost:1/?vm=a", "--vm", "b", "--pool", "/tmp"], "another VM"),
            (["assess", "vsphere://me@localhost:1/", "--staged", "--via", "datastore"], "doesn't go with"),
            (["assess", "vsphere://me@localhost:1/", "--ca", "/etc/hostname"], "no certificate in PEM form"),
            (["assess", "manifest:vms", "--html", "/nowhere/page.html"], "--html /nowhere/page.html"),
            (
                ["migrate", "vsphere://me@localhost:1/", "--vm", "my vm", "--vm", "my-vm", "--pool", "/tmp"],
                "both become the domain my-vm"
            ),
        ])
        func whatCannotBeMeantIsRefused(_ arguments: [String], _ words: String) throws {
            let outcome = try run(Environment.flotilla(), arguments)
            #expect([1, 2].contains(outcome.status) && outcome.errors.contains(words), "\(outcome.errors)")
        }

        @Test(arguments: ["10de:2204", "10de:2204=", "=T4-4Q", "a=b", "10de:22041=T4-4Q"])
        func aMappingThatIsNone(_ argument: String) throws {
            let outcome = try run(
                Environment.flotilla(), ["assess", "manifest:\(folder.path)/vms", "--gpu-map", argument])
            #expect(outcome.status == 2 && outcome.errors.contains("--gpu-map"), "\(outcome.errors)")
        }
    }
}
