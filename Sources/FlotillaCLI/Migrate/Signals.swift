import Glibc
import HostKit

/// Turns signals into something to await. The handler only writes a byte to a pipe, which a thread of its own reads: a
/// blocked mask and sigwait would not do, since the main thread of a Swift program parks in a sigsuspend that lets
/// every signal through.
///
/// The second signal ends the process at once: everything that matters survives that.
struct Signals: Sendable {
    private let received: AsyncStream<Int32>

    init(_ signals: Int32...) {
        let (stream, continuation) = AsyncStream<Int32>.makeStream()
        received = stream
        let reader = signalPipe.read
        spawnThread("signals") {
            var byte: UInt8 = 0
            var count = 0
            while true {
                let got = read(reader, &byte, 1)
                if got < 0 && errno == EINTR { continue }
                guard got == 1 else { return }
                count += 1
                if count > 1 { _exit(Exit.cancelled.rawValue) }
                continuation.yield(Int32(byte))
            }
        }
        for number in signals {
            signal(number) { number in
                var byte = UInt8(truncatingIfNeeded: number)
                write(signalPipe.write, &byte, 1)
            }
        }
    }

    /// Returns at the first signal, or when the task is cancelled.
    func first() async { for await _ in received { return } }
}

/// Made before the first handler is installed, and never closed.
private let signalPipe = makeSignalPipe()

/// A pipe that a signal's handler may write to.
func makeSignalPipe() -> (read: Int32, write: Int32) {
    var ends: (Int32, Int32) = (-1, -1)
    let made = withUnsafeMutablePointer(to: &ends) {
        $0.withMemoryRebound(to: Int32.self, capacity: 2) { pipe($0) }
    }
    precondition(made == 0, "pipe: \(String(cString: strerror(errno)))")
    for end in [ends.0, ends.1] { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
    return (ends.0, ends.1)
}
