import MigrationModel
import Testing

@testable import VSphere

@Suite struct SOAPTests {
    private func envelope(_ body: String) -> String {
        """
        <?xml version="1.0" encoding="UTF-8"?>
        <soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" \
        xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>\(body)</soapenv:Body></soapenv:Envelope>
        """
    }

    /// Feeds `count` bytes at a time.
    private func read(
        _ text: String, by count: Int = 7, each wanted: String? = nil,
        _ take: @escaping (VIMNode) throws -> Void = { _ in }
    ) throws -> VIMNode {
        let reader = try VIMReader(name: "test", each: wanted, take)
        let bytes = Array(text.utf8)
        for start in stride(from: 0, to: bytes.count, by: count) {
            try bytes[start..<min(start + count, bytes.count)].withUnsafeBytes { try reader.feed($0) }
        }
        return try reader.finish()
    }

    @Test func objectsComeOneByOne() throws {
        let object = """
            <objects><obj type="VirtualMachine">vm-1</obj><propSet><name>name</name>\
            <val xsi:type="xsd:string">a &amp; b &#x1F600; <![CDATA[<c>]]></val></propSet>\
            <missingSet><path>config</path><fault><fault xsi:type="NoPermission"/></fault></missingSet>\
            <missingSet><path>new</path><fault><fault xsi:type="InvalidProperty"/></fault></missingSet></objects>
            """
        var names: [String?] = []
        let root = try read(
            envelope(
                "<RetrievePropertiesExResponse><returnval><token>t</token>\(object)\(object)</returnval></RetrievePropertiesExResponse>"
            ),
            each: "objects"
        ) { node in
            let content = try #require(ObjectContent(node))
            #expect(content.object == ObjectReference("VirtualMachine", "vm-1"))
            #expect(content.hidden == ["config"])
            names.append(content.text("name"))
        }
        #expect(names == Array(repeating: "a & b \u{1F600} <c>", count: 2))
        let result = root["Body"]?.children.first?["returnval"]
        #expect(result?.text("token") == "t")
        #expect(result?.all("objects").isEmpty == true)
    }

    @Test func errorsOfTheTakerEndTheReading() {
        struct Enough: Error {}
        #expect(throws: Enough.self) {
            try read(envelope("<R><returnval><objects/><objects/></returnval></R>"), each: "objects") { _ in
                throw Enough()
            }
        }
    }

    @Test(arguments: [
        "<html><body>Sign in<br></body></html>", "", "<a><b></a>", "<a>", "no XML",
        "<!DOCTYPE a [<!ENTITY x \"y\">]><a>&x;</a>",
        String(repeating: "<a>", count: 100) + String(repeating: "</a>", count: 100),
    ])
    func refuses(_ text: String) {
        #expect(throws: MigrationError.self) { try read(text) }
    }

    @Test func faultsKeepTheirTypeAndWords() throws {
        let root = try read(
            envelope(
                """
                <soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>You may not.</faultstring><detail>\
                <NoPermissionFault xsi:type="NoPermission"><privilegeId>VApp.Export</privilegeId></NoPermissionFault>\
                </detail></soapenv:Fault>
                """))
        let fault = VIMFault(soap: try #require(root["Body"]?.children.first))
        #expect(fault.type == "NoPermission")
        let error = fault.error("vc: ExportVm")
        #expect(error.code == .permissionDenied)
        #expect(error.message == "vc: ExportVm: You may not. (NoPermission)")
        #expect(error.hint?.contains("VApp.Export") == true)
    }

    @Test func whatIsSentIsEscaped() throws {
        let nasty = "a<b>&\"'\u{1}\r\u{FFFF}ü"
        let request = VIMRequest(
            "Login", on: ObjectReference("Session<Manager", "x\"y"), [XML.text("password", nasty)])
        let root = try read(String(decoding: request.bytes, as: UTF8.self))
        let call = root["Body"]?["Login"]
        #expect(call?.text("password") == "a<b>&\"'\u{FFFD}\r\u{FFFD}ü")
        #expect(call?.reference("_this") == ObjectReference("Session<Manager", "x\"y"))
    }

    @Test func signedNumbersAreUnsigned() {
        #expect(unsigned16("-32634") == 0x8086)
        #expect(unsigned16("4318") == 0x10de)
        #expect(unsigned16("32902") == 0x8086)
        #expect(unsigned16("70000") == nil)
        #expect(unsigned16("x") == nil)
    }

    @Test(
        arguments: [
            ("1970-01-01T00:00:00Z", 0), ("2024-02-29T12:34:56.789Z", 1_709_210_096_789),
            ("2024-02-29T14:34:56.5+02:00", 1_709_210_096_500), ("2024-02-29", nil), ("2024-02-29T12:34:56", nil),
        ] as [(String, Int64?)])
    func momentsAreRead(_ text: String, _ milliseconds: Int64?) {
        #expect(Moment(timestamp: text)?.milliseconds == milliseconds)
    }

    @Test(
        arguments: [
            ("6.7", .rest), ("7.0.1.0", .rest), ("", .rest), ("x", .rest), ("7.0.2.0", .api), ("8.0", .api),
            ("9.0.0.0", .api), ("10", .api),
        ] as [(String, TagSession.Style)])
    func tagsAreAskedForWhereTheVersionServesThem(_ version: String, _ style: TagSession.Style) {
        #expect(TagSession.Style.order(version: version).first == style)
    }

    @Test func namesAreUnescaped() {
        #expect(unescapedName("a%2fb%5c%25%41%") == "a/b\\%%41%")
        #expect(DatastorePath("[ssd 1] a b/ü & c.vmdk")?.path == "a b/ü & c.vmdk")
        #expect(DatastorePath("ssd/a.vmdk") == nil)
    }

    @Test(
        arguments: [
            ("/vm-42/VirtualLsiLogicController0:1", "scsi0:1"), ("/vm-1/ParaVirtualSCSIController12:15", "scsi12:15"),
            ("/47/VirtualIDEController1:0", "ide1:0"), ("/vm-1/VirtualAHCIController0:3", "sata0:3"),
            ("/vm-1/VirtualNVMEController0:0", "nvme0:0"), ("/vm-1/nvram", nil), ("", nil),
            ("/vm-1/OtherController0:0", nil),
            ("/vm-1/VirtualNVMEController:0", nil), ("/vm-1/VirtualNVMEController0:x", nil),
        ] as [(String, String?)])
    func leaseKeysNameSlots(_ key: String, _ slot: String?) { #expect(NFCLease.slot(ofKey: key) == slot) }
}
