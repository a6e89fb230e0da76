import DiskImage
import Glibc
import Synchronization

/// Takes its time to zero and to flush, and remembers when it was flushed. Keeps its first bytes only.
final class SlowVolume: Volume {
    struct Flush {
        let start: ContinuousClock.Instant
        let end: ContinuousClock.Instant
        /// Bytes that were written before it.
        let written: Int
    }

    private struct State {
        var start = [UInt8](repeating: 0, count: 4096)
        var written = 0
        var flushes: [Flush] = []
    }

    let name = "slow volume"
    let size: UInt64
    let blockSize = 512
    let isDirect = true
    private let zeroDelay: Duration
    private let flushDelay: Duration
    private let state = Mutex(State())

    var flushes: [Flush] { state.withLock { $0.flushes } }

    /// - Parameters:
    ///   - zeroDelay: what one call takes, whatever its range.
    ///   - flushDelay: the same.
    init(size: UInt64, zeroDelay: Duration = .zero, flushDelay: Duration = .zero) {
        self.size = size
        self.zeroDelay = zeroDelay
        self.flushDelay = flushDelay
    }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) {
        buffer.initializeMemory(as: UInt8.self, repeating: 0)
        if offset == 0 { state.withLock { buffer.copyBytes(from: $0.start.prefix(buffer.count)) } }
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) {
        state.withLock {
            $0.written += bytes.count
            if offset == 0 { $0.start.replaceSubrange(..<min(bytes.count, 4096), with: bytes.prefix(4096)) }
        }
    }

    func zero(_ range: Range<UInt64>) { wait(zeroDelay) }

    func flush() {
        let (start, written) = (ContinuousClock.now, state.withLock { $0.written })
        wait(flushDelay)
        let flush = Flush(start: start, end: .now, written: written)
        state.withLock { $0.flushes.append(flush) }
    }

    func contents() -> String? { nil }

    private func wait(_ duration: Duration) {
        if duration > .zero { usleep(UInt32(duration / .microseconds(1))) }
    }
}
