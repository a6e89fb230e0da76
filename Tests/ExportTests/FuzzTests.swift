import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Export

/// Seeded mutations of sound input. What counts is that every run ends, with a value or a MigrationError.
@Suite struct FuzzTests {
    private func mutations(
        of seed: [UInt8], count: Int, generator: UInt64, tokens: [String], _ body: ([UInt8]) throws -> Void
    ) {
        var random = SeededGenerator(state: generator)
        for round in 0..<count {
            var bytes = seed
            for _ in 0..<Int.random(in: 1...4, using: &random) where !bytes.isEmpty {
                let place = Int.random(in: 0..<bytes.count, using: &random)
                switch Int.random(in: 0..<6, using: &random) {
                case 0: bytes[place] = UInt8.random(in: 0...255, using: &random)
                case 1: bytes.removeSubrange(place..<min(bytes.count, place + Int.random(in: 1...64, using: &random)))
                case 2: bytes.insert(contentsOf: bytes[place..<min(bytes.count, place + 64)], at: place)
                case 3: bytes.removeSubrange(place...)
                case 4: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &random)
                default:
                    let token = Array((tokens.randomElement(using: &random) ?? "").utf8)
                    bytes.replaceSubrange(place..<min(bytes.count, place + token.count), with: token)
                }
            }
            do { try body(bytes) } catch {
                if !(error is MigrationError) { Issue.record("round \(round): \(error)") }
            }
        }
    }

    @Test func tar() throws {
        let seed = Tar.archive([
            .init(name: "web.ovf", data: [UInt8](repeating: 1, count: 600)),
            .init(name: "p", data: Tar.pax([("path", "long.vmdk"), ("size", "700")]), type: "x"),
            .init(name: "x", data: [UInt8](repeating: 2, count: 700)),
            .init(name: "@L", data: Array("another-name\0".utf8), type: "L"),
            .init(name: "y", data: [3]),
        ])
        let folder = try TemporaryFolder()
        let path = folder.path + "/a.ova"
        mutations(of: seed, count: 2500, generator: 1, tokens: ["ustar", "../", "7777777", "\u{0}"]) { bytes in
            // Half the time with sums that match, to get past them.
            var bytes = bytes
            for start in stride(from: 0, to: bytes.count - 512, by: 512) where bytes.count % 2 == 0 {
                guard bytes[(start + 257)..<(start + 262)].elementsEqual("ustar".utf8) else { continue }
                for index in 148..<156 { bytes[start + index] = UInt8(ascii: " ") }
                let sum = String(bytes[start..<(start + 512)].reduce(0) { $0 + Int($1) }, radix: 8)
                bytes.replaceSubrange((start + 148)..<(start + 148 + sum.utf8.count), with: Array(sum.utf8))
            }
            let file = try File(path, O_RDWR | O_CREAT | O_TRUNC)
            try file.write(bytes, at: 0)
            for member in try TarReader(file).members() {
                #expect(member.offset + member.length <= UInt64(bytes.count))
            }
        }
    }

    @Test func ovf() throws {
        let folder = try TemporaryFolder()
        try folder.write("gpu node-1.vmdk", Image.sparse(sectors: 16 << 21))
        try folder.write("gpu node-2.vmdk", Image.sparse(sectors: 1 << 21))
        let path = folder.path + "/web.ovf"
        let tokens = [
            "-1", "18446744073709551615", "<Item>", "\"", "&x;", "<!DOCTYPE a>", "../", "byte * 2^63", "17", "]]>",
        ]
        mutations(of: Array(OVFText.vcenter.utf8), count: 2500, generator: 2, tokens: tokens) { bytes in
            try File(path, O_RDWR | O_CREAT | O_TRUNC).write(bytes, at: 0)
            var capture = try OVFCapture(OVFPackage(ovf: path), vmName: nil)
            _ = try capture.run(StopFlag())
        }
    }

    @Test func digestList() {
        let line =
            "SHA256(web.ovf)= \(String(repeating: "0a", count: 32))\r\nSHA1 (d(1).vmdk) = "
            + String(repeating: "f", count: 40) + "\n"
        mutations(of: Array(line.utf8), count: 10_000, generator: 3, tokens: ["(", ")=", "SHA512", "\r", "="]) {
            bytes in
            _ = try DigestList(bytes, name: "web.mf")
        }
    }

    @Test func vmx() throws {
        let folder = try TemporaryFolder()
        for name in ["train", "data", "fast"] { try folder.write("\(name).vmdk", Image.sparse(sectors: 2048)) }
        let path = folder.path + "/train.vmx"
        let tokens = [
            "|", "\"", "\n", "9999999999999999999", "-1", "TRUE", "scsi3:99.fileName", "../", "pciPassthru0.", "|0A",
        ]
        mutations(of: Array(VMXTests.esxi.utf8), count: 2500, generator: 4, tokens: tokens) { bytes in
            var capture = try VMXCapture(bytes, path: path)
            _ = try capture.run(StopFlag())
        }
    }

    @Test func vmdk() throws {
        let folder = try TemporaryFolder()
        let text = Image.descriptor(
            createType: "vmfsSparse", parent: "1", hint: "a.vmdk",
            extents: ["RW 16 VMFS \"a-flat.vmdk\" 0", "RW 8 ZERO"])
        for (seed, number) in [(Array(text.utf8), 5 as UInt64), (Image.sparse(sectors: 2048), 6)] {
            mutations(of: seed, count: 2000, generator: number, tokens: ["RW ", "\"", "99999999999999999999", "KDMV"]) {
                bytes in
                let file = folder.path + "/d.vmdk"
                try File(file, O_RDWR | O_CREAT | O_TRUNC).write(bytes, at: 0)
                let summary = try VMDKSummary(Region.whole(file), owner: "d.vmdk")
                #expect(summary.capacity > 0 && summary.capacity <= UInt64(Int64.max))
            }
        }
    }
}
