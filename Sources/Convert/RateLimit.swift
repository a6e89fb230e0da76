import Dispatch
import Glibc
package import HostKit
import Synchronization

/// A ceiling on bytes per second that all conversions holding the same value share. Whoever takes bytes waits for
/// those that were taken before; nothing is saved up while nobody reads.
package final class RateLimit: Sendable {
    private let nanosecondsPerByte: Double
    /// When, on the monotonic clock, everything taken so far is paid for.
    private let paid = Mutex<UInt64>(0)

    /// - Parameter bytesPerSecond: at least 1.
    package init(bytesPerSecond: UInt64) { nanosecondsPerByte = 1e9 / Double(max(1, bytesPerSecond)) }

    /// Blocks the calling thread until `count` bytes may pass. Throws the flag's reason within a tenth of a second.
    package func take(_ count: Int, stop: StopFlag) throws {
        let cost = UInt64(Double(count) * nanosecondsPerByte)
        let turn = paid.withLock { paid in
            paid = max(paid, DispatchTime.now().uptimeNanoseconds) &+ cost
            return paid
        }
        while true {
            let now = DispatchTime.now().uptimeNanoseconds
            if now >= turn { return }
            if stop.isSet {
                // What never passes must not make others wait.
                paid.withLock { $0 -= cost }
                try stop.check()
            }
            usleep(UInt32(min(turn - now, 100_000_000) / 1000))
        }
    }
}
