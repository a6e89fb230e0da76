/// Exchanges, queues and bindings, as values that any bus can make.
package struct Topology: Sendable, Equatable {
    package enum ExchangeKind: String, Sendable { case direct, topic, fanout }

    package struct Exchange: Sendable, Equatable {
        package var name: String
        package var kind: ExchangeKind

        package init(name: String, kind: ExchangeKind) {
            self.name = name
            self.kind = kind
        }
    }

    /// A quorum queue: durable, replicated, with safe dead-lettering. A queue of any other kind is away whenever its
    /// node is.
    package struct Queue: Sendable, Equatable {
        package var name: String
        /// Where rejected and over-delivered messages go.
        package var deadLetterExchange: String?
        /// Deliveries after which a message is dead-lettered; a backstop behind the store's own count.
        package var deliveryLimit: Int?
        /// Deleted when nobody has used it for so long.
        package var expires: Duration?

        package init(
            name: String, deadLetterExchange: String? = nil, deliveryLimit: Int? = nil, expires: Duration? = nil
        ) {
            self.name = name
            self.deadLetterExchange = deadLetterExchange
            self.deliveryLimit = deliveryLimit
            self.expires = expires
        }
    }

    package struct Binding: Sendable, Equatable {
        package var queue: String
        package var exchange: String
        package var routingKey: String

        package init(queue: String, exchange: String, routingKey: String) {
            self.queue = queue
            self.exchange = exchange
            self.routingKey = routingKey
        }
    }

    package var exchanges: [Exchange]
    package var queues: [Queue]
    package var bindings: [Binding]

    package init(exchanges: [Exchange], queues: [Queue], bindings: [Binding]) {
        self.exchanges = exchanges
        self.queues = queues
        self.bindings = bindings
    }
}

/// The names of one fleet's exchanges and queues.
package struct Names: Sendable, Equatable {
    package var namespace: String

    package init(namespace: String = "flotilla") { self.namespace = namespace }

    package var tasks: String { "\(namespace).tasks" }
    package var control: String { "\(namespace).control" }
    package var events: String { "\(namespace).events" }
    /// Exchange and queue of what other programs ask of the coordinator.
    package var requests: String { "\(namespace).requests" }
    /// Exchange of what other programs are told; they bind queues of their own.
    package var notifications: String { "\(namespace).notifications" }
    package var dead: String { "\(namespace).dead" }
    package var coordinatorEvents: String { "\(namespace).events.coordinator" }

    package func tasks(of host: String) -> String { "\(tasks).\(host)" }
    package func control(of host: String) -> String { "\(control).\(host)" }
    /// Events carry the host in their key, so that a broker can hold each worker to its own.
    package func eventKey(host: String, kind: String) -> String { "evt.\(host).\(kind)" }

    /// Every broken connection counts as a delivery of what was unsettled on it: far more than a bad day brings, and still
    /// an end for a message that kills whoever takes it.
    package static let deliveryLimit = 50

    /// RabbitMQ 4 drops after 20 deliveries what has no limit of its own, and each look at dead letters is one.
    private static let unlimited = 1_000_000_000

    /// Longer than a host is away for repair; the coordinator declares the queue again when the host is back.
    private static let controlExpiry: Duration = .seconds(7 * 24 * 3600)

    package func topology(hosts: [String]) -> Topology {
        var topology = Topology(
            exchanges: [
                .init(name: tasks, kind: .direct), .init(name: control, kind: .direct),
                .init(name: events, kind: .topic), .init(name: requests, kind: .direct),
                .init(name: notifications, kind: .topic), .init(name: dead, kind: .fanout),
            ],
            queues: [
                .init(name: coordinatorEvents, deadLetterExchange: dead, deliveryLimit: Self.deliveryLimit),
                .init(name: requests, deadLetterExchange: dead, deliveryLimit: Self.deliveryLimit),
                .init(name: dead, deliveryLimit: Self.unlimited),
            ],
            bindings: [
                .init(queue: coordinatorEvents, exchange: events, routingKey: "evt.#"),
                .init(queue: requests, exchange: requests, routingKey: requests),
                .init(queue: dead, exchange: dead, routingKey: ""),
            ])
        for host in hosts {
            topology.queues.append(
                .init(name: tasks(of: host), deadLetterExchange: dead, deliveryLimit: Self.deliveryLimit))
            topology.queues.append(
                .init(
                    name: control(of: host), deadLetterExchange: dead, deliveryLimit: Self.deliveryLimit,
                    expires: Self.controlExpiry))
            topology.bindings.append(.init(queue: tasks(of: host), exchange: tasks, routingKey: host))
            topology.bindings.append(.init(queue: control(of: host), exchange: control, routingKey: host))
        }
        return topology
    }
}
