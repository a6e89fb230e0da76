import Foundation
import HostKit
import MigrationModel
import TestKit
import Testing

extension Integration {
    /// Wrong sources, each with its own clear error: exit code, the source untouched, nothing under a final name.
    @Suite(.serialized) struct BadInput {
        /// A copy of the guest's OVA, unpacked, to be damaged and packed again.
        private final class Package {
            let folder: TemporaryFolder
            var parts: String { "\(folder.path)/parts" }

            init() throws {
                folder = try TemporaryFolder()
                try Files.createDirectories("\(folder.path)/parts")
                try require("tar", "-xf", "\(try Environment.guests())/demo-web.ova", "-C", parts)
            }

            var members: [String] {
                get throws {
                    try require("tar", "-tf", "\(try Environment.guests())/demo-web.ova").split(separator: "\n").map(
                        String.init)
                }
            }

            func edit(_ name: String, _ change: (String) -> String) throws {
                let path = "\(parts)/\(name)"
                let text = change(String(decoding: try Files.read(path), as: UTF8.self))
                try Files.writeAtomically(Array(text.utf8), to: path)
            }

            /// Packs the members in their order, with extra arguments for tar.
            func pack(_ names: [String]? = nil, _ extra: [String] = []) throws -> String {
                let path = "\(folder.path)/bad.ova"
                let outcome = try run(
                    "/usr/bin/tar", ["--format=ustar", "-cf", path, "-C", parts] + extra + (try names ?? members))
                try #require(outcome.status == 0, "\(outcome.errors)")
                return path
            }
        }

        private func expectRefused(
            _ source: String, _ words: [String], status: Int32 = 1, sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            let place = try Place()
            defer { try? place.clear() }
            let path = String(source.drop { $0 != ":" }.dropFirst())
            let before = try require("sha256sum", path)
            let outcome = try place.migrate(source)
            #expect(outcome.status == status, "\(outcome.output)\(outcome.errors)", sourceLocation: sourceLocation)
            let said = outcome.output + outcome.errors
            for word in words { #expect(said.contains(word), "\(word) in \(said)", sourceLocation: sourceLocation) }
            #expect(try place.poolFiles.isEmpty, sourceLocation: sourceLocation)
            #expect(try place.domains.isEmpty, sourceLocation: sourceLocation)
            #expect(try require("sha256sum", path) == before, sourceLocation: sourceLocation)
        }

        private func descriptor(_ package: Package) throws -> String { try #require(try package.members.first) }

        private func dropManifest(_ package: Package) throws -> [String] {
            try package.members.filter { !$0.hasSuffix(".mf") }
        }

        @Test func truncatedArchive() throws {
            let package = try Package()
            let path = try package.pack()
            let size = try File(path, O_RDONLY).size
            try File(path, O_WRONLY).truncate(to: size / 2)
            try expectRefused("ova:\(path)", ["truncated"])
        }

        @Test func truncatedDisk() throws {
            let package = try Package()
            let disk = try #require(try package.members.first { $0.hasSuffix(".vmdk") })
            let file = try File("\(package.parts)/\(disk)", O_RDWR)
            let size = try file.size
            try file.truncate(to: size / 2 / 512 * 512)
            let ovf = try descriptor(package)
            try package.edit(ovf) {
                $0.replacingOccurrences(of: "ovf:size=\"\(size)\"", with: "ovf:size=\"\(size / 2 / 512 * 512)\"")
            }
            try expectRefused("ova:\(try package.pack(try dropManifest(package)))", [disk])
        }

        @Test func digestThatDiffers() throws {
            let package = try Package()
            let disk = try #require(try package.members.last { $0.hasSuffix(".vmdk") })
            let mf = try #require(try package.members.first { $0.hasSuffix(".mf") })
            try package.edit(mf) { text in
                text.split(separator: "\n").map { line in
                    line.contains(disk) ? "SHA256(\(disk))= " + String(repeating: "0", count: 64) : String(line)
                }.joined(separator: "\n") + "\n"
            }
            try expectRefused("ova:\(try package.pack())", [disk, String(repeating: "0", count: 64)])
        }

        @Test(arguments: ["s|^demo-web.*1.vmdk|../escape.vmdk|", "s|^demo-web.*1.vmdk|/tmp/escape.vmdk|"])
        func memberNamesThatEscape(_ transform: String) throws {
            let package = try Package()
            let path = try package.pack(nil, ["-P", "--transform", transform])
            try expectRefused("ova:\(path)", ["escape.vmdk"])
            #expect(!Files.exists("/tmp/escape.vmdk"))
        }

        @Test func missingDisk() throws {
            let package = try Package()
            let names = try dropManifest(package)
            let disk = try #require(names.last { $0.hasSuffix(".vmdk") })
            try expectRefused("ova:\(try package.pack(names.filter { $0 != disk }))", [disk])
        }

        @Test func impossibleCapacity() throws {
            let package = try Package()
            try package.edit(try descriptor(package)) { text in
                text.replacing(#/ovf:capacity="\d+"/#, with: "ovf:capacity=\"9223372036854775808\"")
            }
            try expectRefused("ova:\(try package.pack(try dropManifest(package)))", ["9223372036854775808"])
        }

        @Test(arguments: [
            "<!DOCTYPE x [<!ENTITY a \"aaaaaaaaaa\"><!ENTITY b \"&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;\">]>",
            "<!DOCTYPE x [<!ENTITY secret SYSTEM \"file:///etc/passwd\">]>",
        ])
        func documentTypes(_ doctype: String) throws {
            let package = try Package()
            try package.edit(try descriptor(package)) { text in
                text.replacingOccurrences(of: "<Envelope", with: "\(doctype)\n<Envelope")
            }
            try expectRefused("ova:\(try package.pack(try dropManifest(package)))", ["document type"])
        }

        @Test func malformedXML() throws {
            let package = try Package()
            try package.edit(try descriptor(package)) { String($0.dropLast(40)) }
            try expectRefused("ova:\(try package.pack(try dropManifest(package)))", [".ovf"])
        }

        /// The disk fills up while it is written; after making room the same command continues.
        @Test func fullDiskThenRoomThenContinues() throws {
            let place = try Place()
            defer { try? place.clear() }
            try require("mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", place.pool)
            defer { _ = try? run("/usr/bin/umount", [place.pool]) }
            // Preflight must see enough space, the conversion must not: fill it once the image exists.
            let killed = try place.migrate(try web(), failpoint: "convert.image-created")
            #expect(killed.status == -9)
            try require("mount", "-o", "remount,size=24m", place.pool)
            let full = try place.migrate(try web())
            #expect([3, 75].contains(full.status), "\(full.output)\(full.errors)")
            #expect((full.output + full.errors).contains("free some space"))
            #expect(try place.poolFiles.filter { !$0.hasPrefix(".") }.isEmpty)
            try require("mount", "-o", "remount,size=400m", place.pool)
            let again = try place.migrate(try web())
            #expect(again.status == 0, "\(again.output)\(again.errors)")
            try place.expectDisks("demo-web")
        }
    }
}
