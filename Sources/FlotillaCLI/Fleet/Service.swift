import Glibc
import HostKit
import Logging
import Messaging
import MigrationModel
import Synchronization

/// A logger to standard error, one line per message with its metadata as key=value, as journald wants it.
func serviceLogger(_ label: String, verbose: Bool) -> Logger {
    var logger = Logger(label: label) { StreamLogHandler.standardError(label: $0) }
    logger.logLevel = verbose ? .debug : .info
    return logger
}

/// What becomes of the connections to the broker. Both of them, and every attempt, fail for the same reason: that is said
/// once a minute.
final class ConnectionLog: Sendable {
    private let logger: Logger
    private let said = Mutex<[String: ContinuousClock.Instant]>([:])

    init(_ logger: Logger) { self.logger = logger }

    func note(_ connection: BusStatus.Connection) {
        var place: Logger.Metadata = ["connection": "\(connection.name)"]
        if let broker = connection.broker { place["broker"] = "\(broker)" }
        switch connection.state {
        case .connected:
            said.withLock { $0 = [:] }
            logger.info("connected", metadata: place)
        case .blocked(_, let reason): logger.warning("the broker takes no messages: \(reason)", metadata: place)
        case .connecting(let attempt, let error):
            let broker = connection.broker ?? ""
            let reason = error ?? "first attempt"
            let text = reason.contains(broker) ? reason : "broker \(broker): \(reason)"
            guard isNews(text) else { return }
            logger.warning("not connected: \(text)", metadata: ["attempt": "\(attempt)"])
        case .closed: logger.info("closed", metadata: place)
        }
    }

    private func isNews(_ text: String) -> Bool {
        said.withLock { said in
            let now = ContinuousClock.now
            if let last = said[text], now - last < .seconds(60) { return false }
            said[text] = now
            return true
        }
    }
}

/// Ends the process at once, in good order, if it consumes nothing yet: nothing has begun that would have to end.
func endUnlessServing(_ bus: any MessageBus, _ logger: Logger) {
    guard bus.status.consumers.isEmpty else { return }
    logger.info("ended before it served")
    Console.flush()
    _exit(Exit.done.rawValue)
}

/// Ends the process, by throwing, when it looks alive but isn't: a consumer that the broker does not have, a connection
/// that hears nothing although it should hear heartbeats, a delivery that stays with whoever was to settle it, a task that
/// does not stop. While the
/// broker is away the bus reconnects, and nothing here minds. Tells systemd's watchdog of every look.
///
/// - Parameters:
///   - lease: a worker tries for as long to tell that it has taken a task on.
///   - others: what else claims to work and doesn't; nil: nothing.
func watchLiveness(
    of bus: any MessageBus, lease: Duration, publishTimeout: Duration, _ logger: Logger,
    others: @Sendable () -> String? = { nil }
) async throws {
    // Whatever was begun has failed by then, and one thing that had to wait for it.
    let longestHold = (lease + publishTimeout) * 2
    // Looks, not time: a process that was stopped for a while finds out about its connections afterwards.
    let patience = 12
    var sick = 0
    ServiceManager.notify("READY=1")
    while true {
        try await Task.sleep(for: .seconds(5))
        if let problem = bus.status.pretence(at: .now, longestHold: longestHold) ?? others() {
            logger.warning("not working", metadata: ["problem": "\(problem)"])
            sick += 1
            guard sick < patience else {
                throw deadly("this process is alive and does not work: \(problem)", logger)
            }
        } else {
            sick = 0
        }
        ServiceManager.notify("WATCHDOG=1")
    }
}

/// Ends the process, by throwing, when the broker has no consumer of a queue that this process believes to consume, at
/// two looks in a row: a queue may lose one without a word to its channel.
func watchConsumers(of bus: any MessageBus, every interval: Duration, _ logger: Logger) async throws {
    var missed: [BusStatus.Consumer] = []
    while true {
        try await Task.sleep(for: interval)
        let believed = bus.status.consumers.filter(\.isActive)
        // A broker that can't be asked is away, which the bus notices by itself.
        guard let depths = try? await bus.depths(of: believed.map(\.queue)) else { continue }
        let missing = believed.filter { depths[$0.queue]?.consumers == 0 }
        for consumer in missing { logger.warning("bus", metadata: ["problem": "\(consumer.queue) has no consumer"]) }
        // The same registration as before: one that was renewed meanwhile is looked at again.
        let lost = missing.first { consumer in
            missed.contains { $0.queue == consumer.queue && $0.activeSince == consumer.activeSince }
        }
        if let lost {
            throw deadly("nothing consumes \(lost.queue), although the broker agreed to it", logger)
        }
        missed = missing
    }
}

/// An error that ends the process: in order, or, where what is stuck stands in the way of that, all the same. Whatever is
/// under way goes on from its last checkpoint in the next process.
private func deadly(_ problem: String, _ logger: Logger) -> MigrationError {
    let error = MigrationError(.unavailable, problem, hint: "the service manager starts this process again")
    spawnThread("end") {
        sleep(15)
        logger.critical("ends at once, since it does not end in order", metadata: ["problem": "\(problem)"])
        _exit(Exit(error).rawValue)
    }
    return error
}

/// systemd's notification socket (sd_notify(3)); without one nothing happens.
enum ServiceManager {
    static func notify(_ state: String) {
        guard let path = getenv("NOTIFY_SOCKET").map({ Array(String(cString: $0).utf8) }), path.count < 108 else {
            return
        }
        let descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { return }
        defer { close(descriptor) }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { room in
            for (index, byte) in path.enumerated() { room[index] = byte }
            // An abstract address.
            if path.first == UInt8(ascii: "@") { room[0] = 0 }
        }
        let length = socklen_t(MemoryLayout<sa_family_t>.size + path.count)
        withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                _ = sendto(descriptor, state, state.utf8.count, Int32(MSG_NOSIGNAL), $0, length)
            }
        }
    }
}
