import MigrationModel
import Synchronization

/// How far the hosts' clocks are ahead of this one, or behind. A message takes its time, so each tells of a clock that is
/// farther behind than it is; the least of the last few comes closest.
final class HostClocks: Sendable {
    /// A minute of heartbeats: messages that waited while the coordinator was away are forgotten after it.
    private static let remembered = 6

    private let heard = Mutex<[String: [Int64]]>([:])

    func note(_ host: String, signedAt: Moment, now: Moment) {
        heard.withLock { heard in
            let earlier = heard[host] ?? []
            heard[host] = earlier.suffix(Self.remembered - 1) + [signedAt.milliseconds - now.milliseconds]
        }
    }

    /// In milliseconds; nil until something was heard.
    func ahead(_ host: String) -> Int64? { heard.withLock { $0[host]?.max() } }
}
