import MigrationModel
import TestKit
import Testing

@testable import Export

@Suite struct XMLTests {
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let text: String
        let says: String
    }

    static let laughs: String = {
        var text = "<?xml version=\"1.0\"?>\n<!DOCTYPE lolz [\n<!ENTITY l0 \"lol\">\n"
        for level in 1..<10 {
            text += "<!ENTITY l\(level) \"" + String(repeating: "&l\(level - 1);", count: 10) + "\">\n"
        }
        return text + "]>\n<lolz>&l9;</lolz>"
    }()

    static let cases = [
        Case(testDescription: "billion laughs", text: laughs, says: "document type declaration"),
        Case(
            testDescription: "external entity",
            text: "<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><a>&x;</a>",
            says: "document type declaration"),
        Case(
            testDescription: "parameter entity",
            text: "<!DOCTYPE a [<!ENTITY % p SYSTEM \"http://127.0.0.1:1/x.dtd\"> %p;]><a/>",
            says: "document type declaration"),
        Case(
            testDescription: "external subset", text: "<!DOCTYPE a SYSTEM \"http://127.0.0.1:1/x.dtd\"><a/>",
            says: "document type declaration"),
        Case(
            testDescription: "public subset", text: "<!-- c --><!DOCTYPE a PUBLIC \"x\" \"y\">\n<a/>",
            says: "document type declaration"),
        Case(testDescription: "undeclared entity", text: "<a>\n&x;</a>", says: "line 2"),
        Case(testDescription: "mismatch", text: "<a>\n\n<b></a>", says: "line 3"),
        Case(testDescription: "unbound prefix", text: "<ovf:a/>", says: "line 1"),
        Case(testDescription: "two roots", text: "<a/><b/>", says: "line 1"),
        Case(testDescription: "NUL", text: "<a>\u{0}</a>", says: "UTF-8"),
        Case(
            testDescription: "too deep",
            text: String(repeating: "<a>", count: 100) + String(repeating: "</a>", count: 100), says: "deeper"),
        Case(
            testDescription: "far too deep", text: String(repeating: "<a>", count: 100_000), says: "line 1"),
        Case(
            testDescription: "many attributes",
            text: "<a " + (0..<300).map { "b\($0)='>'" }.joined(separator: " ") + "/>", says: "attributes"),
        Case(
            testDescription: "too large", text: "<a>" + String(repeating: " ", count: 16 << 20) + "</a>", says: "larger"
        ),
    ]

    @Test(arguments: cases) func refused(_ example: Case) throws {
        let error = try #require(failure { try XMLDocument.parse(Array(example.text.utf8), name: "web.ovf") })
        #expect(error.code == .invalidArgument && error.message.contains(example.says), "\(error)")
        #expect(error.message.hasPrefix("web.ovf: "))
    }

    @Test func notUTF8() {
        #expect(
            failure { try XMLDocument.parse([0xff, 0xfe, 0x3c, 0x00], name: "x") }?.message.contains("UTF-8") == true)
    }

    @Test func namespacesNotPrefixes() throws {
        let text =
            "<a:x xmlns:a='urn:1' xmlns:b='urn:2' a:k='1' b:k='2' k='3'><b:y>t<![CDATA[<&>]]></b:y><!-- -->u</a:x>"
        let root = try XMLDocument.parse(Array(text.utf8), name: "x")
        #expect(root.name == "x" && root.namespace == "urn:1" && root.text == "u")
        #expect(root.attribute("k", ["urn:2"]) == "2" && root.attribute("k", ["urn:9"]) == "3")
        #expect(root.child("y", ["urn:2"])?.text == "t<&>" && root.child("y", ["urn:1"]) == nil)
    }

    @Test func manyThreadsAtOnce() async throws {
        try await withThrowingTaskGroup(of: Int.self) { group in
            for _ in 0..<8 {
                group.addTask {
                    var refused = 0
                    for index in 0..<200 {
                        let good = index % 2 == 0
                        let text = good ? "<a b='\(index)'><c/></a>" : "<a><b></a>"
                        if (try? XMLDocument.parse(Array(text.utf8), name: "x")) == nil { refused += 1 }
                    }
                    return refused
                }
            }
            for try await refused in group { #expect(refused == 100) }
        }
    }
}
