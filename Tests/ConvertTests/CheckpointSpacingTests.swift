import Convert
import DiskImage
import Glibc
import HostKit
import TestKit
import Testing

/// To sync a disk stalls all writes to it: the more it takes, the longer is the pause to the next time.
@Suite struct CheckpointSpacingTests {
    private static let size = 40 << 20

    /// A conversion of 2.5 seconds or more.
    ///
    /// - Returns: the checkpoints that were taken while data was still to come.
    private func checkpoints(flushDelay: Duration) throws -> [SlowVolume.Flush] {
        let folder = try TemporaryFolder("work")
        var random = Seeded(state: 40)
        let words = (0..<Self.size / 8).map { _ in random.next() }
        let made = try File(folder.file("made.raw"), O_RDWR | O_CREAT)
        try words.withUnsafeBytes { try made.write($0, at: 0) }
        var options = DiskConversion.Options()
        options.checksum = .none
        options.checkpointSeconds = 0.1
        options.rateLimit = RateLimit(bytesPerSecond: 16 << 20)
        let volume = SlowVolume(size: UInt64(Self.size), flushDelay: flushDelay)
        _ = try DiskConversion(
            .file(FileRegion(path: made.path), .raw), to: .volume(volume), workDirectory: folder.file("work"),
            name: "disk0", options: options
        ).run()
        // At first a mark of 4096 bytes, synced; the first chunk is written when the rest is.
        return volume.flushes.filter { 4096 < $0.written && $0.written < 4096 + Self.size - Chunk.size }
    }

    @Test func areFrequentWhereTheyCostNothing() throws {
        let checkpoints = try checkpoints(flushDelay: .zero)
        #expect(checkpoints.count >= 5, "\(checkpoints)")
    }

    @Test func takeATwentiethOfTheTimeAtMost() throws {
        let checkpoints = try checkpoints(flushDelay: .milliseconds(40))
        #expect(checkpoints.count >= 2, "\(checkpoints)")
        for (last, next) in zip(checkpoints, checkpoints.dropFirst()) {
            #expect(next.start - last.end >= (last.end - last.start) * 20)
        }
    }
}
