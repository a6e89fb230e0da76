import Glibc
import HostKit

/// Waits for signals on a thread of its own, with ordinary code instead of a handler. The signals are blocked in every
/// thread that is started afterwards.
struct Signals: Sendable {
    private let received: AsyncStream<Int32>

    init(_ signals: Int32...) {
        var set = sigset_t()
        sigemptyset(&set)
        for signal in signals { sigaddset(&set, signal) }
        pthread_sigmask(SIG_BLOCK, &set, nil)
        let (stream, continuation) = AsyncStream<Int32>.makeStream()
        received = stream
        let waited = set
        spawnThread("signals") {
            var set = waited
            var signal: Int32 = 0
            while sigwait(&set, &signal) == 0 {
                if case .terminated = continuation.yield(signal) { return }
            }
        }
    }

    /// Returns at the first signal, or when the task is cancelled.
    func first() async { for await _ in received { return } }
}
