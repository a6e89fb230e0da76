import Convert
import DiskImage
import Dispatch
import Download
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// Conversions from a web server that works, and from one that doesn't.
@Suite struct DownloadTests {
    private let scene: Scene
    private let server: DiskServer
    private var folder: TemporaryFolder { scene.folder }

    init() async throws {
        scene = try Scene()
        server = try await DiskServer(scene.folder)
    }

    private func conversion(_ path: String, raw: Bool, authorities: String? = nil, base: String? = nil) throws
        -> DiskConversion
    {
        var location = try HTTPLocation("\(base ?? server.base)/\(path)", authorities: authorities)
        location.retries = 2
        let source: DiskConversion.Source =
            raw
            ? .disk(name: location.name) { [location] in try HTTPDisk(location, stop: $0) }
            : .stream(DiskConversion.Stream(name: location.name) { [location] in try HTTPSource(location, stop: $0) })
        var options = DiskConversion.Options()
        options.checkpointBytes = 1
        return DiskConversion(
            source, to: .file(.qcow2, path: folder.file("web.qcow2")), workDirectory: folder.file("work"), name: "web",
            options: options)
    }

    private var stream: String { Files.name(of: scene.conversion.source.path) }

    @Test(arguments: ["", "cut-700000/", "pace-1000000/"])
    func convertsAStreamWhileItDownloads(_ fault: String) throws {
        let source = try Files.read(scene.conversion.source.path)
        let result = try conversion(fault + stream, raw: false).run()
        #expect(result.sourceSHA256 == hex(Digest.hash(.sha256, source)))
        try scene.judge(result)
        #expect(try server.daemon.said().contains("bytes=") == fault.hasPrefix("cut"))
    }

    /// Whether they are larger or smaller than what comes at once.
    @Test(arguments: ["", "pace-3000000/"]) func readsOfAnySizeGiveTheSameBytes(_ fault: String) throws {
        let content = try Files.read(scene.conversion.source.path)
        let source = try HTTPSource(HTTPLocation("\(server.base)/\(fault)\(stream)"), stop: StopFlag())
        var read: [UInt8] = []
        for count in sequence(first: 1, next: { $0 * 3 % 700_001 }) {
            var part = [UInt8](repeating: 0, count: count)
            let got = try part.withUnsafeMutableBytes { try source.read(into: $0) }
            read += part[..<got]
            if got == 0 { break }
        }
        #expect(read == content)
    }

    /// The server is asked for more, and says that there is none.
    @Test func aStreamThatBreaksAtItsVeryEndIsDone() throws {
        let content = try Files.read(scene.conversion.source.path)
        func read(_ fault: String) throws -> [UInt8] {
            let source = try HTTPSource(HTTPLocation("\(server.base)/\(fault)/\(stream)"), stop: StopFlag())
            var read: [UInt8] = []
            var part = [UInt8](repeating: 0, count: 1 << 20)
            while true {
                let got = try part.withUnsafeMutableBytes { try source.read(into: $0) }
                if got == 0 { break }
                read += part[..<got]
            }
            // And stays so.
            #expect(try part.withUnsafeMutableBytes { try source.read(into: $0) } == 0)
            return read
        }
        #expect(try read("open-end") == content)
        #expect(try server.daemon.said().contains("bytes=\(content.count)-"))
        // Nothing tells that what would follow belongs to it.
        #expect(failure { try read("open-end/no-tag") }?.code == .unavailable)
    }

    @Test(arguments: ["", "cut-3000000/", "busy-1/"])
    func readsARawDiskInRanges(_ fault: String) throws {
        // The first request isn't repeated: a wrong URL is told at once.
        if fault == "busy-1/" {
            #expect(failure { _ = try conversion("busy-1/made.raw", raw: true).run() }?.code == .unavailable)
        }
        let result = try conversion(fault + "made.raw", raw: true).run()
        #expect(result.sourceSHA256 == nil && result.sourceBytes == 40 << 20)
        try scene.judge(result)
    }

    @Test func aRawDiskIsContinued() throws {
        let stop = StopFlag()
        let conversion = try conversion("made.raw", raw: true)
        _ = failure { _ = try conversion.run(stop: stop) { if $0.writtenBytes > 0 { stop.set() } } }
        var last: DiskConversion.Progress?
        let result = try conversion.run { last = $0 }
        #expect(stop.isSet ? last.map { $0.resumedBytes > 0 } == true : result.notice == .alreadyPublished)
        try scene.judge(result)
    }

    @Test(arguments: [
        ("no-range/made.raw", true, MigrationError.Code.unimplemented, "ranges"),
        ("changing/made.raw", true, .failedPrecondition, "changed"),
        ("cut-0/made.raw", true, .unavailable, "made.raw"),
        ("html/made.raw", true, .unavailable, "text/html"), ("html/made.vmdk", false, .unavailable, "text/html"),
        ("nothing.raw", true, .notFound, "404"), ("nothing.vmdk", false, .notFound, "404"),
        ("made.raw", false, .invalidArgument, "not a streamOptimized VMDK"),
    ])
    func whatCannotBeReadIsSaid(_ path: String, _ raw: Bool, _ code: MigrationError.Code, _ word: String) throws {
        let error = try #require(failure { _ = try conversion(path, raw: raw).run() })
        #expect(error.code == code && error.message.contains(word), "\(error)")
        #expect(error.message.contains(server.base))
        #expect(!Files.exists(folder.file("web.qcow2")))
    }

    /// Who has no password to give is told about his session.
    @Test(arguments: [true, false]) func aLoginThatIsRefusedIsExplained(_ hasSession: Bool) throws {
        let url = "\(server.base)/login/made.raw"
        let location =
            hasSession
            ? HTTPLocation(url, name: "disk", trust: .system, headers: ["Cookie: a=b"]) : try HTTPLocation(url)
        let error = try #require(failure { try HTTPDisk(location, stop: StopFlag()) })
        #expect(error.code == .unauthenticated && error.message.contains("401"))
        #expect(error.hint?.contains(".netrc") == !hasSession && error.hint?.contains("it ended") == hasSession)
    }

    /// A session's server that answers with a page may do so once; when it goes on, coming back later is no use.
    @Test(arguments: [true, false]) func aPageInPlaceOfADiskIsFinal(_ raw: Bool) throws {
        let name = raw ? "made.raw" : stream
        var location = HTTPLocation(
            "\(server.base)/html/\(name)", name: "disk", trust: .system, headers: ["Cookie: a=b"])
        location.retries = 1
        let error = try #require(
            failure {
                if raw { _ = try HTTPDisk(location, stop: StopFlag()) }
                _ = try HTTPSource(location, stop: StopFlag()).read(
                    into: UnsafeMutableRawBufferPointer(start: nil, count: 0))
            })
        #expect(error.code == .permissionDenied && error.message.contains("text/html"), "\(error)")
        #expect(error.hint?.contains("in the server's place") == true)
        #expect(try server.daemon.said().split(separator: "\n").filter { $0.contains("/html/") }.count == 2)
    }

    @Test(arguments: ["no-tag", "no-range", "changing"])
    func aBrokenStreamIsNotPatchedWithOtherContent(_ fault: String) throws {
        let error = try #require(failure { _ = try conversion("first-300000/\(fault)/\(stream)", raw: false).run() })
        #expect(error.code == .unavailable, "\(error)")
        #expect(!Files.exists(folder.file("web.qcow2")))
    }

    @Test func trustIsChecked() async throws {
        let certificate = folder.file("server.pem")
        try run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=disks", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder.file("key"), "-out",
            folder.file("cert"))
        try run("sh", "-c", "cat '\(folder.file("key"))' '\(folder.file("cert"))' > '\(certificate)'")
        try Files.remove(folder.file("port"))
        let secure = try await DiskServer(folder, certificate: certificate)
        let error = failure { _ = try conversion(stream, raw: false, base: secure.base).run() }
        #expect(
            error?.code == .unauthenticated && error?.hint?.contains("--cacert") == true, "\(String(describing: error))"
        )
        let result = try conversion(
            stream, raw: false, authorities: folder.file("cert"), base: secure.base
        ).run()
        try scene.judge(result)
        let wrongName = secure.base.replacing("127.0.0.1", with: "localhost")
        #expect(
            failure {
                _ = try HTTPSource(
                    HTTPLocation("\(wrongName)/\(stream)", authorities: folder.file("cert")), stop: StopFlag()
                ).read(into: UnsafeMutableRawBufferPointer(start: nil, count: 0))
            }?.code == .unauthenticated)
    }

    @Test(arguments: [true, false]) func cancelsWithinASecond(_ raw: Bool) throws {
        let stop = StopFlag()
        let conversion = try conversion("stall/\(raw ? "made.raw" : stream)", raw: raw)
        DispatchQueue.global().asyncAfter(deadline: .now() + .milliseconds(300)) { stop.set() }
        let start = ContinuousClock.now
        #expect(failure { _ = try conversion.run(stop: stop) }?.code == .cancelled)
        #expect(ContinuousClock.now - start < .milliseconds(1300))
    }

    @Test func secretsStayOutOfMessages() throws {
        let location = try HTTPLocation("https://me@host/disk.vmdk?token=secret")
        #expect(location.name == "https://host/disk.vmdk")
        let error = try #require(failure { _ = try HTTPLocation("https://me:secret@host/disk.vmdk") })
        #expect(error.code == .invalidArgument && !"\(error)".contains("secret"))
        for text in ["http:/x", "https://", "ftp://host/x", "http"] {
            #expect(failure { _ = try HTTPLocation(text) }?.code == .invalidArgument)
        }
    }
}
