import CLinux
import Dispatch
import Glibc
import Synchronization

/// Runs blocking work (disk, libvirt, zlib) on a thread of its own, never on the cooperative pool: a blocked pool
/// thread delays every heartbeat in the process. Meant for work of milliseconds and more; one call per disk or
/// libvirt operation, not per block.
///
/// The thread can't be interrupted. Work that must stop early polls a `StopFlag`.
package func blocking<Value: Sendable>(
    _ name: String = "flotilla", stack: Int = 1 << 20, _ body: @escaping @Sendable () throws -> Value
) async throws -> Value {
    try await withCheckedThrowingContinuation { continuation in
        spawnThread(name, stack: stack) { continuation.resume(with: Result { try body() }) }
    }
}

/// Blocks this thread, which must be of its own and not of the cooperative pool, until what runs there has ended.
package func waiting<Value: Sendable>(_ body: @escaping @Sendable () async throws -> Value) throws -> Value {
    let result = Mutex<Result<Value, any Error>>(.failure(CancellationError()))
    let ended = DispatchSemaphore(value: 0)
    Task {
        let outcome: Result<Value, any Error>
        do { outcome = .success(try await body()) } catch { outcome = .failure(error) }
        result.withLock { $0 = outcome }
        ended.signal()
    }
    ended.wait()
    return try result.withLock { $0 }.get()
}

private final class ThreadBody: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
}

/// Starts a detached POSIX thread. `name` shows in `ps -L` and is cut to 15 bytes; `stack` is in bytes.
package func spawnThread(_ name: String, stack: Int = 1 << 20, _ body: @escaping @Sendable () -> Void) {
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    pthread_attr_setstacksize(&attributes, stack)
    defer { pthread_attr_destroy(&attributes) }
    var thread = pthread_t()
    let box = Unmanaged.passRetained(
        ThreadBody {
            flotilla_name_this_thread(name)
            body()
        })
    let status = pthread_create(
        &thread, &attributes,
        { context in
            guard let context else { return nil }
            Unmanaged<ThreadBody>.fromOpaque(context).takeRetainedValue().run()
            return nil
        }, box.toOpaque())
    // EAGAIN: the process is out of threads. Nothing sensible runs without them.
    precondition(status == 0, "pthread_create: \(String(cString: strerror(status)))")
}
