import Convert
import DiskImage
import Dispatch
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing
import Volumes

/// Conversions onto the exports of real NBD servers.
@Suite struct NBDTests {
    enum Server: String, CaseIterable {
        case nbdkitFile, nbdkitOneConnection, nbdkitWithoutZero, qemu
    }

    private let folder: TemporaryFolder
    private let raw: String
    private var socket: String { folder.file("socket") }
    /// Appears when the server listens.
    private var ready: String { folder.file("ready") }
    private var uri: String { "nbd+unix:///?socket=\(socket)" }
    private var backing: String { folder.file("backing") }

    init() throws {
        folder = try TemporaryFolder("work")
        raw = folder.file("made.raw")
    }

    /// nbdkit with these arguments behind its own.
    private func nbdkit(_ arguments: String) async throws -> Daemon {
        let daemon = try Daemon(
            "sh", "-c", "exec nbdkit --foreground --unix '\(socket)' --pidfile '\(ready)' \(arguments)",
            output: folder.file("said"))
        try await daemon.waits(for: ready)
        return daemon
    }

    private func start(_ server: Server) async throws -> Daemon {
        switch server {
        case .nbdkitFile: return try await nbdkit("file '\(backing)'")
        case .nbdkitOneConnection:
            return try await nbdkit("--filter=multi-conn file '\(backing)' multi-conn-mode=disable")
        case .nbdkitWithoutZero: return try await nbdkit("--filter=nozero file '\(backing)'")
        case .qemu:
            let daemon = try Daemon(
                "qemu-nbd", "--format=raw", "--persistent", "--shared=8", "--cache=none", "--aio=threads",
                "--discard=unmap", "--pid-file=\(ready)", "--socket=\(socket)", backing, output: folder.file("said"))
            try await daemon.waits(for: ready)
            return daemon
        }
    }

    private func noise(_ size: UInt64) throws {
        let file = try File(backing, O_RDWR | O_CREAT | O_TRUNC)
        try file.truncate(to: size)
        let bytes = [UInt8](repeating: 0xA5, count: 1 << 20)
        for offset in stride(from: 0, to: size, by: 1 << 20) {
            try file.write(Array(bytes.prefix(Int(min(1 << 20, size - offset)))), at: offset)
        }
    }

    /// - Parameter rate: bytes per second, for tests that do something meanwhile.
    private func conversion(_ stop: StopFlag = StopFlag(), rate: UInt64? = nil) throws -> DiskConversion {
        var options = DiskConversion.Options()
        options.rateLimit = rate.map { RateLimit(bytesPerSecond: $0) }
        options.checkpointBytes = 1
        return DiskConversion(
            .file(FileRegion(path: raw), .raw), to: .volume(try NBDExport(uri, stop: stop)),
            workDirectory: folder.file("work"), name: "disk0", options: options)
    }

    private func judge() throws {
        let disk = try Files.read(raw, limit: 1 << 30)
        let export = try Files.read(backing, limit: 1 << 30)
        #expect(Array(export.prefix(disk.count)) == disk)
        #expect(export[disk.count...].withUnsafeBytes { isZero($0) })
    }

    @Test(arguments: Server.allCases) func holdsTheDiskAndZerosAfterwards(_ server: Server) async throws {
        try makeRawDisk(raw, size: 21 << 20 | 1536, seed: 21)
        try noise(30 << 20)
        let daemon = try await start(server)
        defer { withExtendedLifetime(daemon) {} }
        let result = try conversion().run()
        #expect(result.notice == .fresh && result.path == uri)
        #expect(result.contentDigest == (try documentedDigest(raw)))
        try judge()
        #expect(try conversion().run().notice == .alreadyPublished)
    }

    @Test func aFullExportIsContinuedWhenItHasRoom() async throws {
        try makeRawDisk(raw, size: 21 << 20, seed: 21)
        try noise(24 << 20)
        let daemon = try await nbdkit(
            "--filter=error file '\(backing)' error-pwrite=ENOSPC error-pwrite-rate=100% "
                + "error-file='\(folder.file("full"))'")
        defer { withExtendedLifetime(daemon) {} }
        let first = try conversion(rate: 8 << 20)
        let error = try #require(
            failure {
                _ = try first.run {
                    if $0.writtenBytes > 0 { _ = try? File(folder.file("full"), O_RDWR | O_CREAT) }
                }
            })
        #expect(error.code == .resourceExhausted && error.hint != nil, "\(error)")
        #expect(error.message.contains(uri) && error.message.contains("No space left"))
        try Files.remove(folder.file("full"))
        #expect(try File(backing, O_RDONLY).readExactly(at: 0, count: 8) == Array("FLOTILLA".utf8))
        let result = try conversion().run()
        #expect(result.notice == .resumed)
        try judge()
    }

    @Test(arguments: [
        ("--readonly file '%' ", "read-only"),
        ("--filter=error file '%' error-pread=EIO error-pread-rate=1.0", "Input/output"),
        ("--filter=truncate file '%' truncate=1M", "needs"),
        ("eval get_size='echo 64M' pread='exit 1' pwrite='exit 1' can_flush='exit 3'", "no flush"),
    ])
    func whatCannotBeWrittenIsSaid(_ server: String, _ word: String) async throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        try noise(9 << 20)
        let daemon = try await nbdkit(server.replacing("%", with: backing))
        defer { withExtendedLifetime(daemon) {} }
        let error = try #require(failure { _ = try conversion().run() })
        #expect(error.message.contains(word) && error.message.contains(uri), "\(error)")
    }

    @Test func whatItHoldsIsNotOverwrittenUnasked() async throws {
        try makeRawDisk(raw, size: 9 << 20, seed: 9)
        try run("mkfs.ext4", "-q", backing, "16M")
        let daemon = try await start(.nbdkitFile)
        defer { withExtendedLifetime(daemon) {} }
        let before = try Files.read(backing)
        var conversion = try conversion()
        let error = failure { _ = try conversion.run() }
        #expect(error?.code == .failedPrecondition && error?.message.contains("ext4") == true)
        #expect(try Files.read(backing) == before)
        conversion.overwrites = true
        _ = try conversion.run()
        try judge()
    }

    @Test(arguments: ["rdelay", "wdelay", "delay-zero"]) func cancelsWithinASecond(_ slow: String) async throws {
        try makeRawDisk(raw, size: 21 << 20, seed: 21)
        try noise(24 << 20)
        let daemon = try await nbdkit("--filter=delay file '\(backing)' \(slow)=600")
        defer { withExtendedLifetime(daemon) {} }
        let stop = StopFlag()
        let conversion = try conversion(stop)
        DispatchQueue.global().asyncAfter(deadline: .now() + .milliseconds(300)) { stop.set() }
        let start = ContinuousClock.now
        #expect(failure { _ = try conversion.run(stop: stop) }?.code == .cancelled)
        #expect(ContinuousClock.now - start < .milliseconds(1300))
    }

    @Test func aServerThatIsNotThereIsSaid() throws {
        let error = failure { _ = try NBDExport(uri, stop: StopFlag()) }
        #expect(error?.code == .unavailable && error?.message.contains(socket) == true)
        for text in ["nbd://h/x", "nbds://h", "nbd+unix:///?socket=x"] { #expect(NBDExport.isOne(text)) }
        for text in ["nbd", "http://h", "/nbd://x"] { #expect(!NBDExport.isOne(text)) }
    }

    @Test func aServerThatDiesIsSaidAndItsSuccessorContinues() async throws {
        try makeRawDisk(raw, size: 21 << 20, seed: 21)
        try noise(24 << 20)
        let daemon = try await start(.nbdkitFile)
        let first = try conversion(rate: 8 << 20)
        let error = try #require(
            failure { _ = try first.run { if $0.writtenBytes > 0 { kill(daemon.pid, SIGKILL) } } })
        #expect(error.code == .unavailable && error.message.contains(uri), "\(error)")
        for path in [socket, ready] { try Files.remove(path) }
        let successor = try await start(.nbdkitFile)
        defer { withExtendedLifetime(successor) {} }
        let result = try conversion().run()
        #expect(result.notice == .resumed)
        try judge()
    }
}
