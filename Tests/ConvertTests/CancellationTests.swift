import Convert
import DiskImage
import Dispatch
import HostKit
import MigrationModel
import TestKit
import Testing

/// A conversion ends soon after its flag is set, whatever it waits for. Pipes, HTTP and NBD have such tests beside their
/// others.
@Suite struct CancellationTests {
    @Test func whileHolesAreWritten() throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 9 << 20, seed: 9)
        let conversion = DiskConversion(
            .file(FileRegion(path: folder.file("made.raw")), .raw),
            to: .volume(SlowVolume(size: 1 << 40, zeroDelay: .milliseconds(60))),
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
