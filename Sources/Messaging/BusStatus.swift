package import MigrationModel

/// How a bus fares right now: enough to tell a consumer that is dead from one that has nothing to do.
package struct BusStatus: Sendable, Equatable {
    package enum State: Sendable, Equatable {
        case connected(since: Moment)
        /// The broker takes no messages for now (out of memory or disk), for the reason it gave.
        case blocked(since: Moment, reason: String)
        /// Not connected; `attempt` counts from 1 since the connection was lost.
        case connecting(attempt: Int, lastError: String?)
        case closed
    }

    package struct Connection: Sendable, Equatable {
        /// What it is for: "publish" or "consume".
        package var name: String
        package var state: State
        /// "host:port" of the broker it has, or had or tried last.
        package var broker: String?
        /// When the broker was last heard of, heartbeats included.
        package var lastInbound: Moment?
        /// How often each side shows that it lives, as agreed on with the broker.
        package var heartbeat = Duration.zero

        package init(
            name: String, state: State, broker: String? = nil, lastInbound: Moment? = nil, heartbeat: Duration = .zero
        ) {
            self.name = name
            self.state = state
            self.broker = broker
            self.lastInbound = lastInbound
            self.heartbeat = heartbeat
        }
    }

    package struct Consumer: Sendable, Equatable {
        package var queue: String
        /// Since when the broker has had it registered without a break; nil while it has not.
        package var activeSince: Moment?
        /// Why it is not.
        package var problem: String?
        /// What it was given first of all that it has not settled.
        package var held: Held?

        package var isActive: Bool { activeSince != nil }

        package init(queue: String, activeSince: Moment?, problem: String? = nil, held: Held? = nil) {
            self.queue = queue
            self.activeSince = activeSince
            self.problem = problem
            self.held = held
        }
    }

    /// A delivery in this process's hands.
    package struct Held: Sendable, Equatable {
        /// "task ID", or "message ID" of one about none.
        package var name: String
        package var duration: Duration

        package init(name: String, duration: Duration) {
            self.name = name
            self.duration = duration
        }
    }

    package var connections: [Connection]
    package var consumers: [Consumer]

    package init(connections: [Connection] = [], consumers: [Consumer] = []) {
        self.connections = connections
        self.consumers = consumers
    }

    /// Everything is connected, nothing blocked, every consumer registered.
    package var isHealthy: Bool { problems.isEmpty }

    /// What keeps it from being healthy, a sentence each.
    package var problems: [String] {
        connections.compactMap { connection in
            switch connection.state {
            case .connected: nil
            case .blocked(_, let reason): "the broker takes no messages: \(reason)"
            case .connecting(let attempt, let error):
                "\(connection.name) connection: attempt \(attempt)" + (error.map { ", \($0)" } ?? "")
            case .closed: "\(connection.name) connection: closed"
            }
        }
            + consumers.filter { !$0.isActive }.map { "consumer of \($0.queue): \($0.problem ?? "starting")" }
    }

    /// What claims to be alive and isn't; nil while all is well, and while the bus knows that it has to reconnect.
    ///
    /// - Parameter longestHold: in which whoever works settles any delivery.
    package func pretence(at now: Moment, longestHold: Duration) -> String? {
        for consumer in consumers {
            guard let held = consumer.held, held.duration > longestHold else { continue }
            return "\(held.name) of \(consumer.queue) has been neither accepted nor rejected "
                + "for \(held.duration.components.seconds) s"
        }
        for connection in connections {
            guard case .connected = connection.state, let heard = connection.lastInbound else { continue }
            let silence = (now.milliseconds - heard.milliseconds) / 1000
            // A link gives a broker up itself after two heartbeats, and needs some time to notice.
            if silence > max(60, connection.heartbeat.components.seconds * 3) {
                return "nothing was heard on the \(connection.name) connection for \(silence) s"
            }
            if connection.name == "consume", let consumer = consumers.first(where: { !$0.isActive }) {
                return "nothing consumes \(consumer.queue): \(consumer.problem ?? "not registered")"
            }
        }
        return nil
    }
}

extension MessageBus {
    /// Returns when it is connected, however long that takes: who starts while the broker is away waits for it, and the
    /// bus itself tells what keeps it.
    package func connected() async throws {
        func isConnected(_ connection: BusStatus.Connection) -> Bool {
            if case .connected = connection.state { true } else { false }
        }
        while !status.connections.allSatisfy(isConnected) { try await Task.sleep(for: .milliseconds(100)) }
    }
}

/// What a queue holds.
package struct QueueDepth: Sendable, Equatable {
    /// Messages that wait, not counting unsettled ones.
    package var ready: Int
    package var consumers: Int

    package init(ready: Int, consumers: Int) {
        self.ready = ready
        self.consumers = consumers
    }
}
