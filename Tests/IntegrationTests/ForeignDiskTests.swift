import Foundation
import HostKit
import TestKit
import Testing

extension Integration {
    /// Disks of Artifact Manifests in formats that qemu-img reads.
    @Suite(.serialized) struct ForeignDisks {
        /// Source format as the manifest calls it, as qemu-img does, and its options.
        private static let formats = [
            ("qcow2", "qcow2", "compat=1.1"), ("vhd", "vpc", "force_size=on"), ("vhdx", "vhdx", ""),
            ("vdi", "vdi", ""), ("raw", "raw", ""),
        ]
        private static let size = 40 << 20

        @Test func arriveWithTheSourceContent() throws {
            let place = try Place()
            defer { try? place.clear() }
            let source = try sources(place)
            let outcome = try place.migrate("manifest:\(source)/vm.json", options: ["--name", "foreign-vm"])
            #expect(outcome.status == 0, "\(outcome.output)\(outcome.errors)")
            for index in Self.formats.indices {
                try require(
                    "qemu-img", "compare", "-f", "qcow2", "-F", "raw",
                    "\(place.pool)/foreign-vm-disk\(index).qcow2", "\(source)/disk\(index).content")
            }
            #expect(!Files.exists("\(place.pool)/.flotilla"))
        }

        @Test func oneWithAnotherDigestIsRefused() throws {
            let place = try Place()
            let source = try sources(place)
            let path = "\(source)/vm.json"
            let text = String(decoding: try Files.read(path), as: UTF8.self)
            let digest = try require("sha256sum", "\(source)/disk2.vhdx").prefix(64)
            try Files.writeAtomically(
                Array(text.replacingOccurrences(of: digest, with: String(repeating: "0", count: 64)).utf8), to: path)
            let outcome = try place.migrate("manifest:\(path)", options: ["--name", "foreign-vm"])
            #expect(outcome.status == 1)
            #expect((outcome.output + outcome.errors).contains("sha256"))
            #expect(try place.poolFiles.isEmpty)
            #expect(try place.domains.isEmpty)
        }

        /// A folder with a manifest, and per disk its image and its content.
        private func sources(_ place: Place) throws -> String {
            let folder = try place.folder.sub("source")
            var disks: [String] = []
            for (index, (name, format, options)) in Self.formats.enumerated() {
                let (content, image) = ("\(folder)/disk\(index).content", "\(folder)/disk\(index).\(name)")
                var generator = SystemRandomNumberGenerator()
                var bytes = [UInt8](repeating: 0, count: 3 << 20)
                for at in bytes.indices { bytes[at] = UInt8.random(in: 0...255, using: &generator) }
                let file = try File(content, O_RDWR | O_CREAT)
                try file.truncate(to: UInt64(Self.size))
                try file.write(bytes, at: UInt64(index) << 20)
                try file.write(bytes, at: UInt64(Self.size - bytes.count))
                let more = options.isEmpty ? [] : ["-o", options]
                let made = try run(
                    "/usr/bin/qemu-img", ["convert", "-f", "raw", "-O", format] + more + [content, image])
                try #require(made.status == 0, "\(made.errors)")
                let digest = try require("sha256sum", image).prefix(64)
                disks.append(
                    """
                    {"id": "d\(index)", "source_format": "\(name)", "bytes": \(try File(image, O_RDONLY).size),
                     "local_path": "disk\(index).\(name)", "checksum": "sha256:\(digest)", "boot_order_hint": \(index)}
                    """)
            }
            let manifest = """
                {"manifest_version": "1.0", "source": {"provider": "vsphere", "vm_name": "foreign vm"},
                 "vm": {"cpu": 1, "mem_gb": 1, "firmware": "bios"}, "disks": [\(disks.joined(separator: ","))]}
                """
            try Files.writeAtomically(Array(manifest.utf8), to: "\(folder)/vm.json")
            return folder
        }
    }
}
