import Download
import Export
import MigrationModel
import TestKit
import Testing

@testable import VSphere

@Suite struct VSphereURLTests {
    @Test(
        arguments: [
            ("vsphere://root@esx.example", "root", "esx.example", nil, nil),
            (
                "vsphere://administrator@vsphere.local@vc.example:8443/DC1", "administrator@vsphere.local",
                "vc.example:8443",
                "DC1", nil
            ),
            (
                "vsphere://DOM%5Cme@vc/Europe/R%26D/?vm=a%26b%20%C3%BC&snapshot=1", "DOM\\me", "vc", "Europe/R&D",
                "a&b ü"
            ),
        ] as [(String, String, String, String?, String?)])
    func parses(_ text: String, _ user: String, _ authority: String, _ datacenter: String?, _ vm: String?) throws {
        let url = try VSphereURL(parsing: text)
        #expect(url.user == user)
        #expect(url.authority == authority)
        #expect(url.datacenter == datacenter)
        #expect(url.vm == vm)
        #expect(url.snapshot == text.contains("snapshot"))
        let again = try VSphereURL(parsing: url.description)
        #expect(again == url)
    }

    @Test(arguments: [
        "vsphere:vc", "vsphere://vc/DC", "vsphere://@vc", "vsphere://me@", "vsphere://me@h<x>/", "vsphere://me@vc/%ff",
        "vsphere://me@vc/DC?vm=", "vsphere://me@vc/DC?wm=x", "vsphere://me@vc/%00", "vsphere://me@vc/DC?via=magic",
    ])
    func refuses(_ text: String) { #expect(throws: MigrationError.self) { try VSphereURL(parsing: text) } }

    @Test(arguments: [
        "vsphere://me:hush@vc/DC", "vsphere:me:hush@vc", "vsphere:/me:hush@vc/DC", "vsphere://me:hush@",
        "vsphere://me:hush",
        "vsphere://me:hu@sh@vc", "vsphere://me:hush#@vc", "vsphere://me:hush?@vc", "vsphere://me:hush@vc/DC?vm=a@b",
        "vsphere://d%5Cme:hush@v c", "me:hush@vc", "me:hush@vc:443", "vcenter://me:hush@vc/DC",
    ])
    func repeatsNoPassword(_ text: String) throws {
        let error = try #require(
            failure { VSphereURL.isOne(text) ? "\(try VSphereURL(parsing: text))" : "\(try SourceURL(parsing: text))" })
        #expect(!error.description.contains("hu") && !error.description.contains("sh@"), "\(error)")
        if text.hasPrefix("vsphere://me:hush@vc") { #expect(error.hint?.contains("--password-file") == true) }
    }

    /// What is no password is shown: a port, a path.
    @Test(arguments: ["vsphere://vc:8443/DC", "vsphere:vc/DC", "vsphere://vc.example"])
    func repeatsWhatIsWrong(_ text: String) throws {
        let error = try #require(failure { try VSphereURL(parsing: text) })
        #expect(error.message.contains("'\(text)'"), "\(error)")
    }

    @Test func fingerprintsHaveTheirLength() throws {
        let text = Array(repeating: "aB", count: 32).joined(separator: ":")
        #expect(try CertificateFingerprint(text, .sha256).description == text.uppercased())
        #expect(throws: MigrationError.self) { try CertificateFingerprint(text, .sha1) }
        #expect(throws: MigrationError.self) { try CertificateFingerprint("zz" + text.dropFirst(2), .sha256) }
    }
}
