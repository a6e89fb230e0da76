import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Export

@Suite struct TarTests {
    static func members(_ bytes: [UInt8]) throws -> [TarMember] {
        let folder = try TemporaryFolder()
        return try TarReader(try File(folder.write("a.ova", bytes), O_RDONLY)).members()
    }

    @Test func namesLongAndShort() throws {
        let long = String(repeating: "long-", count: 40) + ".vmdk"
        let members = try Self.members(
            Tar.archive([
                .init(name: "./web.ovf", data: [1, 2, 3]),
                .init(name: "././@LongLink", data: Array(long.utf8) + [0], type: "L"),
                .init(name: "long-long", data: [4]),
                .init(name: "PaxHeader", data: Tar.pax([("mtime", "1.5"), ("path", "päx.vmdk")]), type: "x"),
                .init(name: "short", data: [5, 6]),
                .init(name: "disk.vmdk", data: [], prefix: "deep/folder"),
                .init(name: "folder/", data: [], type: "5"),
            ]))
        #expect(members.map(\.name) == ["web.ovf", long, "päx.vmdk", "deep/folder/disk.vmdk"])
        #expect(members.map(\.length) == [3, 1, 2, 0])
        #expect(members[0].offset == 512)
    }

    @Test func sizesInEveryForm() throws {
        let binary: [UInt8] = [0x80] + [UInt8](repeating: 0, count: 10) + [3]
        let members = try Self.members(
            Tar.archive([
                .init(name: "binary", data: [1, 2, 3], size: binary),
                .init(name: "pax", data: Tar.pax([("size", "4")]), type: "x"),
                .init(name: "by pax", data: [1, 2, 3, 4], size: Array("00000000000\0".utf8)),
                .init(name: "spaces", data: [1], size: Array("          1 ".utf8)),
            ]))
        #expect(members.map(\.length) == [3, 4, 1])
    }

    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let bytes: [UInt8]
        var code = MigrationError.Code.invalidArgument
        let says: String
    }

    private static func named(_ name: String, _ says: String) -> Case {
        Case(testDescription: name, bytes: Tar.archive([.init(name: name, data: [1])]), says: says)
    }

    private static func typed(_ type: Character, _ says: String) -> Case {
        Case(testDescription: says, bytes: Tar.archive([.init(name: "a", data: [], type: type)]), says: says)
    }

    private static func sized(_ size: [UInt8], _ says: String, _ code: MigrationError.Code = .invalidArgument) -> Case {
        Case(
            testDescription: "size \(size)", bytes: Tar.archive([.init(name: "a", data: [1], size: size)]), code: code,
            says: says)
    }

    static let cases: [Case] = [
        named("/etc/passwd", "absolute"), named("../x", "leads out"), named("a/../../x", "leads out"),
        named("a\\b", "backslash"), named("", "empty"),
        typed("1", "hard link"), typed("2", "symbolic link"), typed("3", "device"), typed("4", "device"),
        typed("6", "FIFO"), typed("K", "long link"), typed("S", "sparse"), typed("z", "unknown type"),
        Case(
            testDescription: "duplicate",
            bytes: Tar.archive([.init(name: "a", data: []), .init(name: "./a", data: [])]),
            says: "two members"),
        Case(
            testDescription: "checksum",
            bytes: {
                var bytes = Tar.archive([.init(name: "a", data: [1])])
                bytes[0] = UInt8(ascii: "b")
                return bytes
            }(), says: "checksum"),
        Case(
            testDescription: "cut in a member",
            bytes: Array(Tar.archive([.init(name: "disk", data: [UInt8](repeating: 1, count: 2000))]).prefix(612)),
            code: .dataLoss, says: "member disk has 2000 bytes and 1900 of them are missing"),
        Case(
            testDescription: "cut in a header", bytes: Array(Tar.archive([.init(name: "a", data: [])]).prefix(100)),
            code: .dataLoss, says: "truncated"),
        Case(testDescription: "text", bytes: [UInt8](repeating: 65, count: 1024), says: "checksum"),
        sized(Array("7777777777777".utf8.prefix(12)), "missing", .dataLoss),
        sized([0x80, 0, 0, 0, 0x7f] + [UInt8](repeating: 0xff, count: 7), "missing", .dataLoss),
        sized([0x80, 0, 0, 0, 0xff] + [UInt8](repeating: 0xff, count: 7), "size field"),
        sized([UInt8](repeating: 0xff, count: 12), "size field"),
        sized(Array("12x\0".utf8), "size field"),
        Case(
            testDescription: "huge pax header",
            bytes: Tar.archive([.init(name: "p", data: [UInt8](repeating: 65, count: 70_000), type: "x")]),
            says: "extended header"),
        Case(
            testDescription: "pax size",
            bytes: Tar.archive([
                .init(name: "p", data: Tar.pax([("size", "99999999999999999999")]), type: "x"),
                .init(name: "a", data: []),
            ]), says: "unusable size"),
        Case(
            testDescription: "pax link",
            bytes: Tar.archive([
                .init(name: "p", data: Tar.pax([("linkpath", "/x")]), type: "x"), .init(name: "a", data: []),
            ]), says: "link"),
        Case(
            testDescription: "pax record",
            bytes: Tar.archive([
                .init(name: "p", data: Array("99 path=x\n".utf8), type: "x"), .init(name: "a", data: []),
            ]), says: "record length"),
        Case(
            testDescription: "pax NUL",
            bytes: Tar.archive([
                .init(name: "p", data: Tar.pax([("path", "a\u{0}b")]), type: "x"), .init(name: "a", data: []),
            ]), says: "NUL"),
    ]

    @Test(arguments: cases) func refused(_ example: Case) throws {
        let error = try #require(failure { try Self.members(example.bytes) })
        #expect(error.code == example.code && error.message.contains(example.says), "\(error)")
    }

    @Test func archiveWithoutEndBlocks() throws {
        #expect(try Self.members(Tar.archive([.init(name: "a", data: [1])], end: false)).count == 1)
    }
}
