import Export
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct OVFRefusalTests {
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let text: String
        let code: MigrationError.Code
        let says: String
        init(_ name: String, _ text: String, _ code: MigrationError.Code = .invalidArgument, _ says: String) {
            (testDescription, self.text, self.code, self.says) = (name, text, code, says)
        }
    }

    private static func file(_ href: String, _ more: String = "") -> String {
        "<File ovf:href=\"\(href)\" ovf:id=\"file1\" \(more)/>"
    }
    private static func disk(_ attributes: String) -> String { "<Disk ovf:diskId=\"vmdisk1\" \(attributes)/>" }
    private static func nic(_ id: Int, _ mac: String) -> String {
        OVFText.item(
            id, 10,
            "<rasd:Address>\(mac)</rasd:Address><rasd:Connection>VM Network</rasd:Connection>"
                + "<rasd:ResourceSubType>E1000</rasd:ResourceSubType>")
    }

    static let cases: [Case] = [
        Case("absolute href", OVFText.small(file: file("/etc/passwd")), "absolute path"),
        Case("parent href", OVFText.small(file: file("../other.vmdk")), "leads out"),
        Case("encoded parent", OVFText.small(file: file("%2e%2e%2fother.vmdk")), "leads out"),
        Case("encoded NUL", OVFText.small(file: file("web%00.vmdk")), "NUL"),
        Case("backslash", OVFText.small(file: file("c:\\web.vmdk")), "backslash"),
        Case("URL", OVFText.small(file: file("http://example.org/web.vmdk")), "URL"),
        Case("file URL", OVFText.small(file: file("file:/etc/passwd")), "URL"),
        Case("missing file", OVFText.small(file: file("gone.vmdk")), .notFound, "gone.vmdk"),
        Case("link out", OVFText.small(file: file("link.vmdk")), .permissionDenied, "link that leaves"),
        Case("directory", OVFText.small(file: file("folder")), "not a regular file"),
        Case("size", OVFText.small(file: file("web-disk1.vmdk", "ovf:size=\"12\"")), .dataLoss, "the OVF says 12"),
        Case(
            "gzip", OVFText.small(file: file("web-disk1.vmdk", "ovf:compression=\"gzip\"")), .unimplemented, "gzip"),
        Case("chunks", OVFText.small(file: file("web-disk1.vmdk", "ovf:chunkSize=\"7\"")), .unimplemented, "chunks"),
        Case("capacity 2^63", OVFText.small(disk: disk("ovf:capacity=\"9223372036854775808\"")), "2^63"),
        Case(
            "capacity overflow",
            OVFText.small(disk: disk("ovf:capacity=\"99999999999\" ovf:capacityAllocationUnits=\"byte * 2^40\"")),
            "2^63"),
        Case(
            "unit overflow",
            OVFText.small(disk: disk("ovf:capacity=\"1\" ovf:capacityAllocationUnits=\"byte * 2^40 * 2^40\"")),
            "exceed 2^63"),
        Case(
            "unknown unit", OVFText.small(disk: disk("ovf:capacity=\"1\" ovf:capacityAllocationUnits=\"furlong\"")),
            "furlong"),
        Case("capacity property", OVFText.small(disk: disk("ovf:capacity=\"${size}\"")), "${size}"),
        Case("unknown fileRef", OVFText.small(disk: disk("ovf:capacity=\"1\" ovf:fileRef=\"file9\"")), "file9"),
        Case(
            "format", OVFText.small(disk: disk("ovf:capacity=\"1\" ovf:format=\"urn:vhd\"")), .unimplemented, "urn:vhd"),
        Case("parentRef", OVFText.small(disk: disk("ovf:capacity=\"1\" ovf:parentRef=\"x\"")), .unimplemented, "delta"),
        Case("unknown disk", OVFText.small(host: "ovf:/disk/other"), "other"),
        Case("foreign resource", OVFText.small(host: "http://x"), "HostResource"),
        Case("unknown controller", OVFText.small(diskParent: "77"), "77"),
        Case("no CPU", OVFText.small(cpu: "many"), "VirtualQuantity"),
        Case("zero CPU", OVFText.small(cpu: "0"), "number of CPUs"),
        Case("memory overflow", OVFText.small(memory: "99999999999999"), "2^63"),
        Case("bad MAC", OVFText.small(nics: nic(9, "00:50:56")), "not a MAC"),
        Case("multicast MAC", OVFText.small(nics: nic(9, "01:50:56:00:00:01")), "multicast"),
        Case("same MAC", OVFText.small(nics: nic(8, "00:50:56:00:00:01") + nic(9, "00-50-56-00-00-01")), "same MAC"),
        Case("old namespace", OVFText.small().replacing("envelope/1", with: "envelope/0.9"), "not an OVF"),
        Case("not XML", "hello", "line 1"),
        Case("unclosed", "<Envelope>", "line 1"),
        Case("empty", "", "web.ovf"),
        Case("image that is none", OVFText.small(file: file("noise.vmdk")), "not a VMDK"),
        Case("truncated image", OVFText.small(file: file("cut.vmdk")), .dataLoss, "truncated"),
    ]

    @Test(arguments: cases) func refused(_ example: Case) throws {
        let folder = try TemporaryFolder()
        let outside = try TemporaryFolder()
        try outside.write("secret.vmdk", Image.sparse(sectors: 16))
        try folder.write("web-disk1.vmdk", Image.sparse(sectors: 1 << 24))
        try folder.write("noise.vmdk", "neither this nor that")
        try folder.write("cut.vmdk", Array(Image.sparse(sectors: 1 << 24).prefix(700)))
        try Files.createDirectories(folder.path + "/folder")
        symlink(outside.path + "/secret.vmdk", folder.path + "/link.vmdk")
        try folder.write("web.ovf", example.text)
        let error = try #require(failure { try folder.capture("ovf", "web.ovf") })
        #expect(error.code == example.code, "\(error)")
        #expect(error.message.contains(example.says), "\(error)")
    }

    static let digestCases: [Case] = [
        Case("altered", "SHA256(web.ovf)= " + String(repeating: "0", count: 64), .dataLoss, "line 1 says 0000"),
        Case("listed but missing", "\nSHA1(gone.iso)= " + String(repeating: "0", count: 40), .notFound, "line 2"),
        Case("malformed", "just text", "line 1"),
        Case("no parenthesis", "SHA1 web.ovf = 00", "line 1"),
        Case("reversed", ")(= 00", "line 1"),
        Case("algorithm", "MD5(web.ovf)= 00", "unknown digest"),
        Case("short digest", "SHA1(web.ovf)= 0011", "40 hexadecimal"),
        Case("not hexadecimal", "SHA1(web.ovf)= " + String(repeating: "z", count: 40), "40 hexadecimal"),
        Case(
            "contradiction",
            "SHA1(web-disk1.vmdk)= \(String(repeating: "0", count: 40))\nSHA1(web-disk1.vmdk)= "
                + String(repeating: "1", count: 40), "contradicts line 1"),
    ]

    @Test(arguments: digestCases) func digestListRefused(_ example: Case) throws {
        let folder = try TemporaryFolder()
        try folder.write("web-disk1.vmdk", Image.sparse(sectors: 1 << 24))
        try folder.write("web.ovf", OVFText.small())
        try folder.write("web.mf", example.text)
        let error = try #require(failure { try folder.capture("ovf", "web.ovf") })
        #expect(error.code == example.code && error.message.contains(example.says), "\(error)")
    }
}

extension OVFRefusalTests.Case {
    init(_ name: String, _ text: String, _ says: String) { self.init(name, text, .invalidArgument, says) }
}
