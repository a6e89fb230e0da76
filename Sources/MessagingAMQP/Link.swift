import CRabbitMQ
import Glibc
import HostKit
import Messaging
import MigrationModel
import Synchronization

/// What a link's connection is for. Lives on the link's thread; nothing here may wait.
protocol LinkRole: AnyObject {
    /// A new connection, on which nothing has been asked yet.
    func connected(_ connection: Connection) throws
    func handle(_ frame: Frame, _ connection: Connection) throws
    /// Takes up what other threads asked for, and what is due; with no connection, fails what has waited too long.
    /// Returns when it wants to be called again at the latest.
    func work(_ connection: Connection?) throws -> ContinuousClock.Instant?
    /// The connection and all its channels are gone.
    func disconnected(_ error: MigrationError)
    /// Whether nothing is left to do before a graceful end.
    var isIdle: Bool { get }
    /// The link ends: nothing will be done any more.
    func ended(_ error: MigrationError)
}

/// Keeps one connection to one of the brokers, with a thread of its own that serves it: reads, sends, answers
/// heartbeats, connects again when it is lost, for ever until it is closed.
final class Link: Sendable {
    private struct State {
        var status: BusStatus.Connection
        /// Set once the end is asked for: when a graceful end stops being waited for.
        var endBy: ContinuousClock.Instant?
        var hasEnded = false
        var waiters: [CheckedContinuation<Void, Never>] = []
        /// A duplicate of the connection's socket, with which another thread can cut it.
        var socket: Int32?
    }

    /// Of threads that read from a broker, in bytes: librabbitmq goes down into headers' tables and arrays as deep as they
    /// are nested, which a frame of 1 MiB has room to be 200,000 times. What is not touched takes no memory.
    static let stack = 64 << 20

    private let configuration: AMQPConfiguration
    private let wakeup: Wakeup
    private let onChange: @Sendable (BusStatus.Connection) -> Void
    private let state: Mutex<State>

    /// - Parameter role: is made on the link's thread and stays there.
    init(
        _ name: String, _ configuration: AMQPConfiguration, _ wakeup: Wakeup,
        _ onChange: @escaping @Sendable (BusStatus.Connection) -> Void, role: @escaping @Sendable () -> any LinkRole
    ) {
        self.configuration = configuration
        self.wakeup = wakeup
        self.onChange = onChange
        state = Mutex(State(status: .init(name: name, state: .connecting(attempt: 1, lastError: nil))))
        spawnThread("amqp \(name)", stack: Self.stack) { [self] in run(role()) }
    }

    var status: BusStatus.Connection { state.withLock { $0.status } }

    /// Ends when the role has nothing left to do, or after `grace`. Returns when the thread is done, or about to be.
    func close(grace: Duration) async {
        state.withLock { if $0.endBy == nil { $0.endBy = .now + grace } }
        wakeup.signal()
        let rescue = Task {
            try await Task.sleep(for: grace + .seconds(1))
            cut()
        }
        await withCheckedContinuation { continuation in
            let hasEnded = state.withLock { state in
                if !state.hasEnded { state.waiters.append(continuation) }
                return state.hasEnded
            }
            if hasEnded { continuation.resume() }
        }
        rescue.cancel()
    }

    /// Wakes a thread that is stuck in sending. One that is connecting can't be woken; it is not waited for.
    private func cut() {
        let waiters = state.withLock { state in
            if let socket = state.socket {
                shutdown(socket, Int32(SHUT_RDWR))
                return [CheckedContinuation<Void, Never>]()
            }
            defer { state.waiters = [] }
            return state.waiters
        }
        for waiter in waiters { waiter.resume() }
    }

    private var isEnding: Bool { state.withLock { $0.endBy != nil } }

    private func change(_ body: (inout State) -> Void) {
        let status = state.withLock { state in
            body(&state)
            return state.status
        }
        onChange(status)
    }

    // MARK: - The thread

    private func run(_ role: any LinkRole) {
        // Not all clients of a cluster on its first node.
        var next = Int.random(in: 0..<configuration.brokers.count)
        var attempt = 0
        while !isEnding {
            let broker = configuration.brokers[next % configuration.brokers.count]
            next += 1
            let started = ContinuousClock.now
            do {
                try serve(broker, role)
                break
            } catch {
                // A connection that held for a while is no reason to wait longer for the next.
                if ContinuousClock.now - started > configuration.backoff.limit { attempt = 0 }
                attempt += 1
                let error = error as? MigrationError ?? MigrationError(.internal, "\(error)")
                change { state in
                    state.status.broker = broker.description
                    state.status.state = .connecting(attempt: attempt, lastError: error.description)
                }
                role.disconnected(error)
                rest(configuration.backoff.delay(after: attempt), role)
            }
        }
        role.ended(MigrationError(.unavailable, "the bus is closed"))
        change { $0.status.state = .closed }
        let waiters = state.withLock { state in
            state.hasEnded = true
            defer { state.waiters = [] }
            return state.waiters
        }
        for waiter in waiters { waiter.resume() }
    }

    /// Returns when a graceful end has been reached.
    private func serve(_ broker: AMQPConfiguration.Broker, _ role: any LinkRole) throws {
        let name = status.name
        let connection = try Connection(to: broker, configuration, name: name)
        let socket = fcntl(connection.descriptor, F_DUPFD_CLOEXEC, 0)
        change { state in
            state.socket = socket >= 0 ? socket : nil
            state.status.broker = broker.description
            state.status.lastInbound = .now
            state.status.heartbeat = connection.heartbeat
            state.status.state = .connected(since: .now)
        }
        defer {
            state.withLock { $0.socket = nil }
            if socket >= 0 { Glibc.close(socket) }
        }
        try role.connected(connection)
        while true {
            // Asked first: what was asked for before the end is done then.
            let endBy = state.withLock { $0.endBy }
            let due = try role.work(connection)
            if let endBy, role.isIdle || endBy < .now {
                connection.close()
                return
            }
            if !connection.hasBuffered { try wait(connection, until: due) }
            // In portions, so that a flood of deliveries doesn't keep settlements waiting.
            var portion = 0
            while portion < 256, let frame = try connection.receive() {
                if !(try handle(frame, connection)) { try role.handle(frame, connection) }
                portion += 1
            }
            if portion == 256 { wakeup.signal() }
        }
    }

    /// Until the broker sends something, another thread calls, or something is due.
    private func wait(_ connection: Connection, until due: ContinuousClock.Instant?) throws {
        var timeout = connection.heartbeat > .zero ? connection.heartbeat / 4 : .seconds(5)
        if let due { timeout = min(timeout, due - .now) }
        if let endBy = state.withLock({ $0.endBy }) { timeout = min(timeout, endBy - .now) }
        var descriptors = [
            pollfd(fd: connection.descriptor, events: Int16(POLLIN), revents: 0),
            pollfd(fd: wakeup.descriptor, events: Int16(POLLIN), revents: 0),
        ]
        // Rounded up: a millisecond early would be a busy loop.
        let count = poll(&descriptors, 2, Int32(clamping: max(timeout.milliseconds + 1, 0)))
        guard count >= 0 || errno == EINTR else { throw systemError("wait for", "broker \(connection.broker)") }
        if descriptors[1].revents != 0 { wakeup.clear() }
        if descriptors[0].revents & Int16(POLLIN) != 0 { state.withLock { $0.status.lastInbound = .now } }
    }

    /// Frames about the connection itself. False for any other.
    private func handle(_ frame: Frame, _ connection: Connection) throws -> Bool {
        guard case .method(0, let method) = frame else { return false }
        switch method {
        case .connectionClose(let code, let text):
            try? connection.send(
                AMQP_CONNECTION_CLOSE_OK_METHOD, amqp_connection_close_ok_t(dummy: 0), channel: 0)
            throw Connection.refusal(code: code, text: text)
        case .connectionBlocked(let reason):
            connection.blocked = reason
            change { $0.status.state = .blocked(since: .now, reason: reason) }
        case .connectionUnblocked:
            connection.blocked = nil
            change { $0.status.state = .connected(since: .now) }
        default: break
        }
        return true
    }

    /// Between two attempts: still fails what has waited too long.
    private func rest(_ time: Duration, _ role: any LinkRole) {
        let end = ContinuousClock.now + time
        while !isEnding, ContinuousClock.now < end {
            let due = (try? role.work(nil)) ?? nil
            let timeout = min(end, due ?? end) - .now
            var descriptor = pollfd(fd: wakeup.descriptor, events: Int16(POLLIN), revents: 0)
            if poll(&descriptor, 1, Int32(clamping: max(timeout.milliseconds + 1, 0))) > 0 { wakeup.clear() }
        }
    }
}
