import Dispatch
package import HostKit
import Synchronization

/// A ceiling on bytes per second that all conversions holding the same value share. Whoever takes bytes waits for
/// those that were taken before; nothing is saved up while nobody reads.
package final class RateLimit: Sendable {
    package let bytesPerSecond: UInt64
    private let nanosecondsPerByte: Double
    /// When, on the monotonic clock, everything taken so far is paid for.
    private let paid = Mutex<UInt64>(0)

    /// - Parameter bytesPerSecond: at least 1.
    package init(bytesPerSecond: UInt64) {
        self.bytesPerSecond = max(1, bytesPerSecond)
        nanosecondsPerByte = 1e9 / Double(max(1, bytesPerSecond))
    }

    /// Blocks the calling thread until `count` bytes may pass. Throws the flag's reason as soon as it is set.
    package func take(_ count: Int, stop: StopFlag) throws {
        let cost = UInt64(Double(count) * nanosecondsPerByte)
        let now = DispatchTime.now().uptimeNanoseconds
        let turn = paid.withLock { paid in
            paid = max(paid, now) &+ cost
            return paid
        }
        do { try stop.wait(for: .nanoseconds(Int64(clamping: turn - now))) } catch {
            // What never passes must not make others wait.
            paid.withLock { $0 -= cost }
            throw error
        }
    }
}
