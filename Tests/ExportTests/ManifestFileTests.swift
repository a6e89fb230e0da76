import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Export

@Suite struct ManifestFileTests {
    static let good = """
        {"schemaVersion": 1, "vm": {"name": "web", "cpu": {"count": 2, "coresPerSocket": 2},
         "memory": {"bytes": "1073741824"}, "firmware": "EFI", "biosUuid": "564d6c0a-1b2c-3d4e-5f60-718293a4b5c6"},
         "disks": [{"id": "disk0", "capacityBytes": 1048576, "controller": "PVSCSI",
          "source": {"path": "web.raw", "format": "raw", "expected": [{"algorithm": "sha1",
          "hex": "da39a3ee5e6b4b0d3255bfef95601890afd80709"}]}}],
         "nics": [{"id": "nic0", "mac": "00:50:56:9a:10:01", "network": "VM Network",
          "addresses": [{"ip": "10.0.0.7", "prefixLength": 24}]}],
         "gpus": [{"id": "gpu0", "vgpu": {"profile": "grid_a100-40c"}, "config": {"cfg.enable_uvm": "1"}}]}
        """

    private func problems(_ text: String) throws -> [ManifestProblem] {
        try ManifestFile(Array(text.utf8), name: "web.json").problems
    }

    @Test func goodOneIsRead() throws {
        let file = try ManifestFile(Array(Self.good.utf8), name: "web.json")
        #expect(file.problems.isEmpty)
        #expect(file.manifest?.gpus.first?.vgpu.profile == "grid_a100-40c")
    }

    /// protocol/check judges them by the schema alone.
    @Test func vectors() throws {
        let folder = "\(#filePath)".replacing(
            "Tests/ExportTests/ManifestFileTests.swift", with: "protocol/vectors/manifest")
        let names = try Files.list(folder)
        #expect(names.count >= 7)
        for name in names {
            let file = try ManifestFile(path: "\(folder)/\(name)")
            #expect(file.problems.isEmpty == name.hasPrefix("good-"), "\(name): \(file.problems)")
        }
    }

    /// A line of any length, and of anything, is not said again.
    @Test func whatIsNoYAMLIsSaidInFew() throws {
        let text = "vm: [\u{1B}[31m" + String(repeating: "x", count: 100_000)
        let error = try #require(failure { try ManifestFile(Array(text.utf8), name: "web.yaml") })
        #expect(error.message.utf8.count < 900 && error.message.contains("neither JSON nor YAML"))
        #expect(!error.message.contains("\u{1B}") && error.hint != nil)
    }

    @Test func whatIsWrittenIsValid() throws {
        let manifest = try #require(try ManifestFile(Array(Self.good.utf8), name: "web.json").manifest)
        let again = try ManifestFile(manifest.jsonUTF8Bytes(), name: "again")
        #expect(again.manifest == manifest)
    }

    /// Text of the good one, what replaces it, and where the problem has to be told.
    @Test(arguments: [
        ("\"schemaVersion\": 1", "\"schemaVersion\": 2", "schemaVersion"),
        ("\"schemaVersion\": 1,", "", "schemaVersion"),
        ("\"name\": \"web\"", "\"nam\": \"web\"", "vm.nam"),
        ("\"firmware\"", "\"firm_ware\"", "vm.firm_ware"),
        ("\"EFI\"", "\"UEFI\"", "vm.firmware"), ("\"EFI\"", "2", "vm.firmware"),
        ("\"count\": 2", "\"count\": 0", "vm.cpu.count"), ("\"count\": 2", "\"count\": 3", "vm.cpu.coresPerSocket"),
        ("\"count\": 2", "\"count\": 1.5", "vm.cpu.count"), ("\"count\": 2", "\"count\": \"2\"", "vm.cpu.count"),
        ("\"1073741824\"", "\"-1\"", "vm.memory.bytes"), ("\"1073741824\"", "12345", "vm.memory.bytes"),
        ("\"1073741824\"", "18446744073709551616", "vm.memory.bytes"),
        ("564d6c0a-1b2c", "564D6C0A-1b2c", "vm.biosUuid"),
        ("\"id\": \"disk0\"", "\"id\": \"../disk0\"", "disks[0].id"),
        ("1048576", "1000", "disks[0].capacityBytes"), ("\"raw\"", "\"iso\"", "disks[0].source.format"),
        ("\"hex\": \"da", "\"hex\": \"zz", "disks[0].source.expected[0].hex"),
        ("\"sha1\"", "\"sha256\"", "disks[0].source.expected[0].hex"),
        ("\"sha1\"", "\"md5\"", "disks[0].source.expected[0].algorithm"),
        ("00:50:56:9a:10:01", "01:50:56:9a:10:01", "nics[0].mac"), ("00:50:56:9a", "00-50-56-9a", "nics[0].mac"),
        ("\"prefixLength\": 24", "\"prefixLength\": 33", "nics[0].addresses[0]"),
        ("10.0.0.7", "10.0.0.777", "nics[0].addresses[0]"),
        ("\"id\": \"gpu0\",", "\"id\": \"gpu0\", \"passthrough\": {},", "gpus[0]"),
        ("\"vgpu\": {\"profile\": \"grid_a100-40c\"}", "\"msiEnabled\": true", "gpus[0]"),
        ("\"cfg.enable_uvm\": \"1\"", "\"cfg.enable_uvm\": 1", "gpus[0].config[\"cfg.enable_uvm\"]"),
        ("\"nics\": [{", "\"nics\": [{\"id\": \"nic0\"}, {", "nics[1].id"),
    ])
    func badOnes(_ old: String, _ new: String, _ path: String) throws {
        let text = Self.good.replacing(old, with: new, maxReplacements: 1)
        #expect(text != Self.good)
        let found = try problems(text)
        #expect(found.contains { $0.path == path }, "\(found)")
        #expect(found.allSatisfy { !$0.remedy.isEmpty })
    }

    @Test func misspeltFieldsAreNamed() throws {
        let found = try problems(Self.good.replacing("\"biosUuid\"", with: "\"bios_uuid\""))
        #expect(found.first?.remedy == "the field is called biosUuid")
    }

    @Test(arguments: [
        "", "[]", "null", "{", "{\"a\":1,\"a\":2}", "{\"a\":01}", "{\"a\":\"\\ud800\"}", "{\"a\":tru}", "{} x",
        "a: &x [1]\nb: *x", "- 1", String(repeating: "[", count: 100_000), "{\"a\":\"\u{1}\"}",
        "{\"schemaVersion\":" + String(repeating: "[", count: 100_000),
    ])
    func noManifests(_ text: String) {
        #expect(
            failure { _ = try ManifestFile(Array(text.utf8), name: "x").valid(name: "x") }?.code == .invalidArgument)
    }

    @Test func textsOfJSON() throws {
        let tree = try JSONTree(
            parsing: Array(#"{"a":"\u00e9\ud83d\ude00\n\/","b":[1e3,-0.5,true,null]}"#.utf8), name: "x")
        #expect(tree["a"] == .string("é😀\n/"))
        #expect(tree["b"] == .array([.number("1e3"), .number("-0.5"), .bool(true), .null]))
        #expect(try JSONTree(parsing: Array(tree.indented.utf8), name: "x") == tree)
    }
}

@Suite struct HyperSDKTests {
    static let good = """
        manifest_version: "1.0"
        source: {provider: vsphere, vm_id: vm-42, vm_name: web, datacenter: DC1}
        vm:
          cpu: 4
          mem_gb: 8
          firmware: uefi
          secureboot: true
          os_hint: windows
        disks:
          - {id: data, source_format: raw, bytes: 1024, local_path: data.raw, boot_order_hint: 1}
          - id: boot-disk
            source_format: vmdk
            bytes: 10752
            local_path: web.vmdk
            checksum: sha256:CHECKSUM
            disk_type: boot
        nics: [{id: eth0, mac: 00-50-56-9A-10-01, network: VM Network}]
        warnings: [{stage: export, message: tools missing}]
        pipeline: {convert: {enabled: true}}
        """

    private func folder(_ text: String = good) throws -> TemporaryFolder {
        let folder = try TemporaryFolder()
        let image = Image.sparse(sectors: 2048)
        try folder.write("web.vmdk", image)
        try folder.write("data.raw", [UInt8](repeating: 0, count: 1024))
        try folder.write("web.yaml", text.replacing("CHECKSUM", with: hex(Digest.hash(.sha256, image))))
        return folder
    }

    @Test func asASource() throws {
        let folder = try folder()
        let manifest = try folder.capture("manifest", "web.yaml")
        #expect(manifest.source.kind == .manifest && manifest.source.vmMoid == "vm-42")
        #expect(manifest.vm.name == "web" && manifest.vm.cpu.count == 4 && manifest.vm.memory.bytes == 8 << 30)
        #expect(manifest.vm.firmware == .efi && manifest.vm.secureBoot && manifest.vm.tools.family == "windowsGuest")
        #expect(manifest.disks.map(\.label) == ["boot-disk", "data"])
        #expect(manifest.disks.map(\.capacityBytes) == [1 << 20, 1024])
        #expect(manifest.disks[0].source.path == "\(folder.path)/web.vmdk")
        #expect(manifest.disks[0].source.expected.map(\.algorithm) == ["sha256"])
        #expect(manifest.nics[0].mac == "00:50:56:9a:10:01")
        #expect(manifest.findings.contains { $0.message.contains("tools missing") })
        #expect(manifest.findings.contains { $0.message.contains("'pipeline'") })
        #expect(try fingerprint(of: manifest) == manifest.source.fingerprint)
        try folder.write("data.raw", [UInt8](repeating: 1, count: 2048))
        #expect(try fingerprint(of: manifest) != manifest.source.fingerprint)
    }

    @Test func flatFilesAreTheDiskItself() throws {
        let text = Self.good.replacing("local_path: data.raw", with: "local_path: data-flat.vmdk")
            .replacing("source_format: raw", with: "source_format: vmdk")
        let folder = try folder(text)
        try folder.write("data-flat.vmdk", [UInt8](repeating: 0, count: 1024))
        let disk = try #require(try folder.capture("manifest", "web.yaml").disks.last)
        #expect(disk.source.format == "raw" && disk.capacityBytes == 1024)
    }

    @Test func roundTrip() throws {
        let folder = try folder()
        let manifest = try folder.capture("manifest", "web.yaml")
        let written = try manifest.hyperSDK { UInt64(try File($0, 0).status().st_size) }
        try folder.write("again.json", written)
        let again = try folder.capture("manifest", "again.json")
        #expect(again.vm.name == manifest.vm.name && again.vm.cpu == manifest.vm.cpu)
        #expect(again.vm.memory.bytes == manifest.vm.memory.bytes && again.vm.firmware == manifest.vm.firmware)
        #expect(again.vm.secureBoot && again.vm.tools.family == "windowsGuest")
        #expect(again.disks.map(\.capacityBytes) == manifest.disks.map(\.capacityBytes))
        #expect(again.disks.map(\.source.expected) == manifest.disks.map(\.source.expected))
        #expect(again.disks.map(\.source.path) == manifest.disks.map(\.source.path))
        #expect(again.nics.map(\.mac) == manifest.nics.map(\.mac))
    }

    @Test(arguments: [
        ("\"1.0\"", "\"2.0\"", "manifest_version"), ("cpu: 4", "cpu: 0", "vm.cpu"), ("cpu: 4", "cpu: 4.5", "vm.cpu"),
        ("mem_gb: 8", "mem_gb: -1", "vm.mem_gb"), ("uefi", "coreboot", "vm.firmware"),
        ("source_format: raw", "source_format: iso", "disks[0].source_format"), ("bytes: 1024,", "", "disks[0].bytes"),
        ("id: data,", "id: boot-disk,", "disks[1].id"), ("sha256:CHECKSUM", "md5:12", "disks[1].checksum"),
        ("local_path: data.raw,", "", "disks[0].local_path"), ("os_hint", "os_kind", "vm.os_kind"),
        ("00-50-56-9A-10-01", "nonsense", "nics[0].mac"), ("secureboot: true", "secureboot: 1", "vm.secureboot"),
    ])
    func badOnes(_ old: String, _ new: String, _ path: String) throws {
        let text = Self.good.replacing(old, with: new, maxReplacements: 1)
        let found = try ManifestFile(Array(text.utf8), name: "web.yaml").problems
        #expect(found.contains { $0.path == path }, "\(found)")
    }

    @Test(arguments: ["../web.vmdk", "web-link.vmdk"])
    func pathsStayInTheFolder(_ path: String) throws {
        let folder = try folder(Self.good.replacing("local_path: web.vmdk", with: "local_path: \(path)"))
        if path == "web-link.vmdk" { symlink("/etc/passwd", "\(folder.path)/web-link.vmdk") }
        let code = failure { try folder.capture("manifest", "web.yaml") }?.code
        #expect(code == .invalidArgument || code == .permissionDenied)
    }

    @Test func absolutePathsNeedPermission() throws {
        let folder = try folder(Self.good.replacing("local_path: data.raw", with: "local_path: /etc/passwd"))
        let error = failure {
            try captureManifest(
                from: SourceURL(parsing: "manifest:\(folder.path)/web.yaml"), vmName: nil, stop: StopFlag()
            ) { throw MigrationError(.permissionDenied, "\($0) is not a source") }
        }
        #expect(error?.code == .permissionDenied)
    }

    @Test func wrongSizeIsRefused() throws {
        let folder = try folder(Self.good.replacing("bytes: 1024", with: "bytes: 4096"))
        #expect(failure { try folder.capture("manifest", "web.yaml") }?.code == .dataLoss)
    }

    @Test func backingFilesAreRefused() throws {
        let folder = try folder(
            Self.good.replacing("source_format: raw, bytes: 1024", with: "source_format: qcow2, bytes: 0"))
        var header = [UInt8](repeating: 0, count: 112)
        header.replaceSubrange(0..<4, with: [0x51, 0x46, 0x49, 0xFB])
        header[29] = 16
        try folder.write("data.raw", header)
        #expect(try folder.capture("manifest", "web.yaml").disks[1].capacityBytes == 1 << 20)
        header[15] = 104
        try folder.write("data.raw", header)
        #expect(failure { try folder.capture("manifest", "web.yaml") }?.code == .failedPrecondition)
    }

    @Test func ourOwnManifestAsASource() throws {
        let folder = try folder()
        try folder.write("web.raw", [UInt8](repeating: 0, count: 1 << 20))
        try folder.write("web.json", ManifestFileTests.good)
        let manifest = try folder.capture("manifest", "web.json")
        #expect(manifest.gpus.first?.vgpu.profile == "grid_a100-40c", "it keeps its GPUs")
        #expect(manifest.disks[0].source.path == "\(folder.path)/web.raw")
        try folder.write("web.raw", [UInt8](repeating: 0, count: 512))
        #expect(failure { try folder.capture("manifest", "web.json") }?.code == .dataLoss)
    }
}
