import HostKit
import MigrationModel

/// How to reach a RabbitMQ, and as whom.
package struct AMQPConfiguration: Sendable, Equatable {
    package struct Broker: Sendable, Equatable, CustomStringConvertible {
        /// With TLS, a DNS name of the broker's certificate: addresses are not verified, not even those it lists.
        package var host: String
        package var port: Int

        package init(host: String, port: Int) {
            self.host = host
            self.port = port
        }

        package var description: String { "\(host):\(port)" }

        var isLoopback: Bool { host == "localhost" || host == "::1" || host.hasPrefix("127.") }
    }

    package struct TLS: Sendable, Equatable {
        /// PEM file of the authorities that may have signed the broker's certificate. The system's own don't count.
        package var authorities: String
        /// PEM files of this client. Nobody but their owner may read the key.
        package var certificate: String?
        package var key: String?

        package init(authorities: String, certificate: String? = nil, key: String? = nil) {
            self.authorities = authorities
            self.certificate = certificate
            self.key = key
        }
    }

    package enum Authentication: Sendable, Equatable {
        /// By the client certificate.
        case external
        /// The file holds the password alone, in one line, and nobody but its owner may read it. Read at every
        /// connect, so that it can be changed.
        case plain(user: String, passwordFile: String)
    }

    /// Nodes of one cluster, tried in turn from a random one on.
    package var brokers: [Broker]
    package var virtualHost = "/"
    package var tls: TLS?
    /// Without TLS, whoever is on the way reads and changes messages and passwords: brokers elsewhere than on this
    /// machine are refused unless this is set.
    package var allowsPlaintext = false
    package var authentication: Authentication
    /// What the connection is called in the broker's listings.
    package var connectionName = "flotilla"
    /// A broker that has been silent for twice as long is given up. The broker may ask for less.
    package var heartbeat: Duration = .seconds(10)
    /// From the call of `publish` to its end: waiting for a connection, for room, and for the confirm.
    package var publishTimeout: Duration = .seconds(30)
    /// For each of: TCP and TLS connection, login, an answer of the broker to a request.
    package var requestTimeout: Duration = .seconds(10)
    /// Between attempts to connect, or to consume: a random time up to `base`, doubled each time, up to `limit`.
    package var backoff = Backoff()

    package init(brokers: [Broker], tls: TLS? = nil, authentication: Authentication) {
        self.brokers = brokers
        self.tls = tls
        self.authentication = authentication
    }

    /// Throws `invalidArgument` or `failedPrecondition` for what can't work or must not be.
    package func validate() throws {
        guard !brokers.isEmpty else { throw MigrationError(.invalidArgument, "no broker is configured") }
        for broker in brokers {
            guard (1...65535).contains(broker.port), !broker.host.isEmpty else {
                throw MigrationError(.invalidArgument, "'\(broker)' is no broker address")
            }
            guard tls != nil || allowsPlaintext || broker.isLoopback else {
                throw MigrationError(
                    .failedPrecondition, "the connection to broker \(broker) is not encrypted",
                    hint: "configure TLS, or allow plain text explicitly")
            }
        }
        guard (1...600).contains(heartbeat.components.seconds) else {
            throw MigrationError(.invalidArgument, "a heartbeat of \(heartbeat) is not between 1 and 600 s")
        }
        guard publishTimeout > .zero, requestTimeout > .zero else {
            throw MigrationError(.invalidArgument, "timeouts must be longer than nothing")
        }
        switch authentication {
        case .external:
            guard tls?.certificate != nil else {
                throw MigrationError(
                    .failedPrecondition, "EXTERNAL authentication needs TLS with a client certificate")
            }
        case .plain(let user, _):
            guard !user.isEmpty else { throw MigrationError(.invalidArgument, "the broker user has no name") }
        }
        guard (tls?.certificate == nil) == (tls?.key == nil) else {
            throw MigrationError(.invalidArgument, "a client certificate and its key must be given together")
        }
    }

    /// The first line of a password file. Throws when others may read it, or it holds none.
    static func password(_ path: String) throws -> String {
        let bytes = try Files.readSecret(path)
        guard let line = bytes.split(separator: UInt8(ascii: "\n"), maxSplits: 1).first, !line.contains(0) else {
            throw MigrationError(.failedPrecondition, "\(path) holds no password in its first line")
        }
        return String(decoding: line, as: UTF8.self)
    }
}

/// Exponential backoff with full jitter: a random time from nothing up to a bound that doubles.
package struct Backoff: Sendable, Equatable {
    package var base: Duration
    package var limit: Duration

    package init(base: Duration = .milliseconds(200), limit: Duration = .seconds(15)) {
        self.base = base
        self.limit = limit
    }

    /// - Parameter attempt: failures so far, from 1.
    func delay(after attempt: Int) -> Duration { bound(after: attempt) * Double.random(in: 0...1) }

    func bound(after attempt: Int) -> Duration { min(base * (1 << min(max(attempt, 1) - 1, 16)), limit) }
}
