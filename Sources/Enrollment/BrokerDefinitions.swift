import Foundation
package import Messaging
import MessagingAMQP
import MigrationModel

/// What an operator imports into RabbitMQ (`rabbitmqctl import_definitions`): the virtual host, a user for each member
/// of the fleet, what each may do, the exchanges and queues, and policies with the room that queues may take. Users have no
/// password: they log in by certificate.
package struct BrokerDefinitions: Encodable {
    private struct VirtualHost: Encodable { let name: String }

    private struct User: Encodable {
        let name: String
        let passwordHash = ""
        let hashingAlgorithm = "rabbit_password_hashing_sha256"
        let tags = ""
        let limits: [String: Int] = [:]
    }

    private struct Permission: Encodable {
        let user: String
        let vhost: String
        let configure: String
        let write: String
        let read: String
    }

    private struct TopicPermission: Encodable {
        let user: String
        let vhost: String
        let exchange: String
        let write: String
        let read: String
    }

    private struct Exchange: Encodable {
        let name: String
        let vhost: String
        let type: String
        let durable = true
        let autoDelete = false
        let `internal` = false
        let arguments: [String: Int] = [:]
    }

    private struct Queue: Encodable {
        let name: String
        let vhost: String
        let durable = true
        let autoDelete = false
        let arguments: [String: Argument]
    }

    private enum Argument: Encodable {
        case text(String)
        case number(Int64)

        func encode(to encoder: any Encoder) throws {
            var container = encoder.singleValueContainer()
            switch self {
            case .text(let text): try container.encode(text)
            case .number(let number): try container.encode(number)
            }
        }
    }

    private struct Binding: Encodable {
        let source: String
        let vhost: String
        let destination: String
        let destinationType = "queue"
        let routingKey: String
        let arguments: [String: Int] = [:]
    }

    /// What arguments say of a queue can't be changed while it exists; a policy can, at any time.
    private struct Policy: Encodable {
        let name: String
        let vhost: String
        let pattern: String
        let applyTo = "queues"
        let definition: [String: Int64]
        // A queue has one policy: general ones of the same broker don't get at those of the fleet.
        let priority = 100

        private enum CodingKeys: String, CodingKey {
            case name, vhost, pattern
            case applyTo = "apply-to"
            case definition, priority
        }
    }

    /// Bytes of messages that a queue holds. Far more than a fleet's worst day brings, and less than fills a disk that
    /// others use: a queue then refuses what is sent to it, and senders try again. Nobody may be kept from dead-lettering,
    /// so there the oldest letters go.
    private static let room: Int64 = 1 << 30
    private static let roomOfLetters: Int64 = 256 << 20

    private let vhosts: [VirtualHost]
    private let users: [User]
    private let permissions: [Permission]
    private let topicPermissions: [TopicPermission]
    private let exchanges: [Exchange]
    private let queues: [Queue]
    private let bindings: [Binding]
    private let policies: [Policy]

    /// Throws `invalidArgument` for a requester that would share user or queues with somebody else.
    ///
    /// - Parameter requesters: users of other programs that may ask for migrations and hear of them.
    package init(_ names: Names, hosts: [String], requesters: [String] = [], virtualHost: String) throws {
        for (index, user) in requesters.enumerated() {
            try Self.requireRequester(user, names, besides: hosts + requesters[..<index])
        }
        let topology = names.topology(hosts: hosts)
        func literally(_ text: String) -> String { NSRegularExpression.escapedPattern(for: text) }
        let nothing = "^$"
        vhosts = [VirtualHost(name: virtualHost)]
        users = ([FleetMember.coordinator] + hosts + requesters).map { User(name: $0) }
        let own = "^\(literally(names.namespace))\\..*"
        permissions =
            [
                Permission(
                    user: FleetMember.coordinator, vhost: virtualHost, configure: own, write: own, read: own)
            ]
            + hosts.map { host in
                let queues = [names.tasks(of: host), names.control(of: host)].map(literally).joined(separator: "|")
                return Permission(
                    user: host, vhost: virtualHost, configure: nothing, write: "^\(literally(names.events))$",
                    read: "^(\(queues))$")
            }
            + requesters.map { user in
                // Its own queues, to bind to the notifications.
                let own = "\(literally(user))\\..*"
                return Permission(
                    user: user, vhost: virtualHost, configure: "^\(own)$",
                    write: "^(\(literally(names.requests))|\(own))$",
                    read: "^(\(literally(names.notifications))|\(own))$")
            }
        topicPermissions = hosts.map { host in
            TopicPermission(
                user: host, vhost: virtualHost, exchange: names.events, write: "^evt\\.\(literally(host))\\.[^.]+$",
                read: nothing)
        }
        exchanges = topology.exchanges.map { Exchange(name: $0.name, vhost: virtualHost, type: $0.kind.rawValue) }
        queues = topology.queues.map { queue in
            let arguments = queue.arguments.compactMap { name, value -> (String, Argument)? in
                switch value {
                case .string(let text): (name, .text(text))
                case .integer(let number): (name, .number(number))
                case .bytes: nil
                }
            }
            return Queue(
                name: queue.name, vhost: virtualHost,
                arguments: Dictionary(arguments, uniquingKeysWith: { first, _ in first }))
        }
        let alive =
            [names.tasks, names.control, names.events].map { literally($0) + "\\..+" } + [literally(names.requests)]
        policies = [
            Policy(
                name: names.namespace, vhost: virtualHost, pattern: "^(\(alive.joined(separator: "|")))$",
                definition: ["max-length-bytes": Self.room]),
            Policy(
                name: names.dead, vhost: virtualHost, pattern: "^\(literally(names.dead))$",
                definition: ["max-length-bytes": Self.roomOfLetters]),
        ]
        bindings = topology.bindings.map {
            Binding(source: $0.exchange, vhost: virtualHost, destination: $0.queue, routingKey: $0.routingKey)
        }
    }

    private static func requireRequester(_ user: String, _ names: Names, besides others: [String]) throws {
        guard FleetMember.isHostName(user) else {
            throw MigrationError(.invalidArgument, "'\(user)' can't name a requester: \(FleetMember.hostNameRule)")
        }
        // It may do anything with queues whose names begin with its own and a dot.
        let (own, fleets) = ("\(user).", "\(names.namespace).")
        guard !own.hasPrefix(fleets), !fleets.hasPrefix(own) else {
            throw MigrationError(
                .invalidArgument, "'\(user)' can't name a requester: names of the fleet's queues begin with \(fleets)")
        }
        guard !others.contains(user) else {
            throw MigrationError(
                .invalidArgument, "'\(user)' can't name a requester: a host or another requester has that name")
        }
    }

    package func json() throws -> String {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        return String(decoding: try encoder.encode(self), as: UTF8.self)
    }
}
