import Convert
import DiskImage
import Dispatch
import Glibc
import HostKit
import MigrationModel
import Synchronization
import TestKit
import Testing

/// A conversion ends soon after its flag is set, whatever it waits for. Pipes, HTTP and NBD have such tests beside their
/// others.
@Suite struct CancellationTests {
    /// Far larger than its disk, and slow to zero. Keeps its first bytes only.
    private final class SlowVolume: Volume {
        let name = "slow volume"
        let size: UInt64 = 1 << 40
        let blockSize = 512
        let isDirect = true
        private let start = Mutex([UInt8](repeating: 0, count: 4096))

        func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) {
            buffer.initializeMemory(as: UInt8.self, repeating: 0)
            if offset == 0 { start.withLock { buffer.copyBytes(from: $0.prefix(buffer.count)) } }
        }

        func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) {
            if offset == 0 { start.withLock { $0.replaceSubrange(..<bytes.count, with: bytes) } }
        }

        func zero(_ range: Range<UInt64>) { usleep(60_000) }
        func flush() {}
        func contents() -> String? { nil }
    }

    @Test func whileHolesAreWritten() throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 9 << 20, seed: 9)
        let conversion = DiskConversion(
            .file(FileRegion(path: folder.file("made.raw")), .raw), to: .volume(SlowVolume()),
            workDirectory: folder.file("work"), name: "disk0")
        let stop = StopFlag()
        var stopped: ContinuousClock.Instant?
        let error = failure {
            _ = try conversion.run(stop: stop) {
                guard stopped == nil, $0.finishedBytes > 0 else { return }
                stopped = .now
                stop.set()
            }
        }
        #expect(error?.code == .cancelled)
        #expect(stopped.map { ContinuousClock.now - $0 < .seconds(1) } == true)
    }

    @Test(arguments: [SourceKind.stream, .raw]) func whileARateIsKept(_ kind: SourceKind) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 70 << 20, seed: 70)
        let limit = RateLimit(bytesPerSecond: 1000)
        var options = DiskConversion.Options()
        options.rateLimit = limit
        let conversion = DiskConversion(
            source: FileRegion(path: try kind.make(from: folder.file("made.raw"), in: folder)),
            sourceFormat: kind.format, targetFormat: .qcow2, workDirectory: folder.file("work"), name: "disk0",
            finalPath: folder.file("disk.qcow2"), options: options)
        let stop = StopFlag()
        DispatchQueue.global().asyncAfter(deadline: .now() + .milliseconds(300)) { stop.set() }
        let start = ContinuousClock.now
        #expect(failure { _ = try conversion.run(stop: stop) }?.code == .cancelled)
        #expect(ContinuousClock.now - start < .milliseconds(1300))
        // Nobody pays for what the cancelled one didn't read.
        let after = ContinuousClock.now
        try limit.take(1, stop: StopFlag())
        #expect(ContinuousClock.now - after < .seconds(1))
    }
}
