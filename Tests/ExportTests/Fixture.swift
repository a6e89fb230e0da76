import Export
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit

extension TemporaryFolder {
    @discardableResult
    func write(_ name: String, _ bytes: [UInt8]) throws -> String {
        try Files.createDirectories(Files.parent(of: "\(path)/\(name)"))
        try File("\(path)/\(name)", O_WRONLY | O_CREAT | O_TRUNC).write(bytes, at: 0)
        return "\(path)/\(name)"
    }

    @discardableResult
    func write(_ name: String, _ text: String) throws -> String { try write(name, Array(text.utf8)) }

    func capture(_ kind: String, _ name: String, vm: String? = nil) throws -> Manifest {
        try captureManifest(from: SourceURL(parsing: "\(kind):\(path)/\(name)"), vmName: vm, stop: StopFlag())
    }
}

/// Images with just the parts a manifest is made from.
enum Image {
    static func sparse(sectors: UInt64, createType: String = "streamOptimized", extra: String = "") -> [UInt8] {
        let text = descriptor(createType: createType, extents: ["RDONLY \(sectors) SPARSE \"x.vmdk\""], extra: extra)
        var bytes = [UInt8](repeating: 0, count: 512 * 21)
        bytes.replaceSubrange(0..<4, with: Array("KDMV".utf8))
        for (offset, value) in [(4, 3 as UInt64), (12, sectors), (20, 128), (28, 1), (36, 20)] {
            for byte in 0..<(offset == 4 ? 4 : 8) {
                bytes[offset + byte] = UInt8(truncatingIfNeeded: value >> (8 * byte))
            }
        }
        bytes.replaceSubrange(512..<(512 + text.utf8.count), with: Array(text.utf8))
        return bytes
    }

    static func descriptor(
        createType: String, parent: String = "ffffffff", hint: String? = nil, extents: [String], extra: String = ""
    ) -> String {
        """
        # Disk DescriptorFile
        version=1
        encoding="UTF-8"
        CID=fb183c20
        parentCID=\(parent)
        createType="\(createType)"
        \(hint.map { "parentFileNameHint=\"\($0)\"" } ?? "")
        # Extent description
        \(extents.joined(separator: "\n"))
        # The Disk Data Base
        ddb.uuid = "60 00 C2 9a 2b 11 22 33-44 55 66 77 88 99 aa bb"
        \(extra)

        """
    }
}

/// Writes tar archives, sound ones and others.
enum Tar {
    struct Member {
        var name: String
        var data: [UInt8]
        var type: Character = "0"
        var prefix = ""
        /// Overrides the size field.
        var size: [UInt8]?
    }

    static func header(_ member: Member) -> [UInt8] {
        var header = [UInt8](repeating: 0, count: 512)
        func put(_ offset: Int, _ text: some Sequence<UInt8>, _ limit: Int) {
            for (index, byte) in text.prefix(limit).enumerated() { header[offset + index] = byte }
        }
        put(0, member.name.utf8, 100)
        put(100, "0000644\0".utf8, 8)
        put(124, member.size ?? Array(octal(member.data.count, 11).utf8), 12)
        put(136, "14000000000\0".utf8, 12)
        put(156, String(member.type).utf8, 1)
        put(257, "ustar\u{0}00".utf8, 8)
        put(345, member.prefix.utf8, 155)
        put(148, "        ".utf8, 8)
        let sum = header.reduce(0) { $0 + Int($1) }
        put(148, (octal(sum, 6) + "\u{0} ").utf8, 8)
        return header
    }

    static func archive(_ members: [Member], end: Bool = true) -> [UInt8] {
        var bytes: [UInt8] = []
        for member in members {
            bytes += header(member) + member.data
            bytes += [UInt8](repeating: 0, count: (512 - member.data.count % 512) % 512)
        }
        return end ? bytes + [UInt8](repeating: 0, count: 1024) : bytes
    }

    static func pax(_ records: [(String, String)]) -> [UInt8] {
        records.flatMap { key, value -> [UInt8] in
            let body = " \(key)=\(value)\n"
            var length = body.utf8.count + 1
            while "\(length)".utf8.count + body.utf8.count != length { length += 1 }
            return Array("\(length)\(body)".utf8)
        }
    }

    private static func octal(_ value: Int, _ width: Int) -> String {
        let digits = String(value, radix: 8)
        return String(repeating: "0", count: max(0, width - digits.count)) + digits
    }
}

/// A small deterministic generator (SplitMix64) so that a failing run can be repeated.
struct SeededGenerator: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ (value >> 27)) &* 0x94d0_49bb_1331_11eb
        return value ^ (value >> 31)
    }
}
