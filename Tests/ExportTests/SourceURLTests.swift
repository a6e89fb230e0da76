import Export
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct SourceURLTests {
    @Test func forms() throws {
        let here = try Files.canonical(".")
        for (text, kind, path) in [
            ("ova:/a/b.ova", SourceURL.Kind.ova, "/a/b.ova"), ("ovf:./x/b.ovf", .ovf, "\(here)/x/b.ovf"),
            ("vmx:b c.vmx", .vmx, "\(here)/b c.vmx"), ("vmx:../b.vmx", .vmx, "\(here)/../b.vmx"),
            ("ova:/a:b.ova", .ova, "/a:b.ova"),
        ] {
            let url = try SourceURL(parsing: text)
            #expect(url.kind == kind && url.path == path && url.description == text)
        }
    }

    @Test(
        arguments: [
            ("", .invalidArgument), ("web.ova", .invalidArgument), ("ova:", .invalidArgument),
            ("OVA:/x", .invalidArgument),
            ("qcow2:/x", .invalidArgument), ("ova://host/x", .invalidArgument), ("ova:/", .invalidArgument),
            ("ova:a\u{0}b", .invalidArgument), ("vsphere://u@vc/DC", .invalidArgument), ("manifest:", .invalidArgument),
        ] as [(String, MigrationError.Code)])
    func refused(_ text: String, _ code: MigrationError.Code) throws {
        let error = try #require(failure { try SourceURL(parsing: text) })
        #expect(error.code == code && error.hint?.contains("ova:PATH") ?? false, "\(error)")
    }

    @Test func stopFlagEndsTheCapture() throws {
        let stop = StopFlag()
        stop.set()
        let url = try SourceURL(parsing: "ova:/nowhere")
        #expect(failure { try captureManifest(from: url, vmName: nil, stop: stop) }?.code == .cancelled)
    }

    @Test func fingerprintFollowsEveryFile() throws {
        let folder = try TemporaryFolder()
        try folder.write("web-disk1.vmdk", Image.sparse(sectors: 1 << 24))
        try folder.write("web.ovf", OVFText.small())
        let manifest = try folder.capture("ovf", "web.ovf")
        #expect(manifest.source.fingerprint.count == 64)
        #expect(try fingerprint(of: manifest) == manifest.source.fingerprint)
        // Same size, other modification time.
        var times = [timespec(tv_sec: 1, tv_nsec: 7), timespec(tv_sec: 1, tv_nsec: 7)]
        #expect(utimensat(AT_FDCWD, folder.path + "/web-disk1.vmdk", &times, 0) == 0)
        let second = try fingerprint(of: manifest)
        #expect(second != manifest.source.fingerprint)
        try folder.write("web.mf", "")
        #expect(try fingerprint(of: manifest) != second)
        try Files.remove(folder.path + "/web-disk1.vmdk")
        #expect(failure { try fingerprint(of: manifest) }?.code == .notFound)
        #expect(failure { try fingerprint(of: Manifest()) }?.code == .invalidArgument)
    }
}
