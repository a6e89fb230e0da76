import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import TestKit
import Testing

extension RabbitMQ {
    /// Who may connect, to what, and what they may do there.
    @Suite struct Security {}
}

extension RabbitMQ.Security {
    /// What keeps the bus from connecting.
    private func refusal(_ configuration: AMQPConfiguration) async throws -> String {
        let bus = try AMQPBus(configuration)
        let error = try await eventually {
            bus.status.connections.compactMap { connection in
                if case .connecting(_, .some(let error)) = connection.state { error } else { nil }
            }.first
        }
        let publish = try await code { try await bus.publish(Message(exchange: "", routingKey: "", body: [])) }
        await bus.close()
        #expect(publish == .unavailable)
        return try #require(error)
    }

    private var impatient: AMQPConfiguration {
        get throws {
            var configuration = try Broker.current.tlsConfiguration("kvm1")
            configuration.publishTimeout = .milliseconds(300)
            return configuration
        }
    }

    @Test func clientCertificateLogsInAsItsCommonName() async throws {
        let broker = try Broker.current
        let names = Broker.names()
        try await withBus(broker.tlsConfiguration("coordinator")) { coordinator in
            try await coordinator.declare(names.topology(hosts: ["kvm1"]))
            let events = try await coordinator.subscribe(names.coordinatorEvents, prefetch: 10)
            try await withBus(broker.tlsConfiguration("kvm1")) { worker in
                var event = Message(exchange: names.events, routingKey: "evt.kvm1.accepted", body: [1])
                event.userID = "kvm1"
                try await worker.publish(event)
            }
            var iterator = events.deliveries.makeAsyncIterator()
            #expect(try await iterator.delivery().message.userID == "kvm1")
        }
    }

    @Test func certificateForAnotherHostNameIsRefused() async throws {
        var configuration = try impatient
        // The certificate lists only DNS:localhost.
        configuration.brokers = configuration.brokers.map { .init(host: "127.0.0.1", port: $0.port) }
        #expect(try await refusal(configuration).contains("not for '127.0.0.1'"))
    }

    @Test func certificateOfAnotherAuthorityIsRefused() async throws {
        var configuration = try impatient
        configuration.tls?.authorities = try Broker.current.tls("other-ca.pem")
        #expect(try await refusal(configuration).contains("TLS with broker"))
    }

    @Test func wrongPasswordIsRefused() async throws {
        let folder = try TemporaryFolder()
        let file = "\(folder.path)/password"
        try Files.writeAtomically(Array("wrong\n".utf8), to: file)
        var configuration = try Broker.current.configuration("kvm1")
        configuration.publishTimeout = .milliseconds(300)
        configuration.authentication = .plain(user: "kvm1", passwordFile: file)
        #expect(try await refusal(configuration).contains("Login was refused"))
    }

    @Test func passwordFileThatOthersMayReadIsRefused() async throws {
        let folder = try TemporaryFolder()
        let file = "\(folder.path)/password"
        try Files.writeAtomically(
            try Files.read("\(try Broker.current.folder.path)/b/passwords/kvm1"), to: file, mode: 0o640)
        var configuration = try Broker.current.configuration("kvm1")
        configuration.publishTimeout = .milliseconds(300)
        configuration.authentication = .plain(user: "kvm1", passwordFile: file)
        #expect(try await refusal(configuration).contains("can be read by others"))
    }

    @Test func unknownVirtualHostIsRefused() async throws {
        var configuration = try impatient
        configuration.virtualHost = "elsewhere"
        let said = try await refusal(configuration)
        #expect(said.contains("vhost elsewhere not found") && said.contains("flotilla fleet definitions"))
    }

    @Test func plainTextLeavesThisMachineOnlyWhenAllowed() throws {
        var configuration = AMQPConfiguration(
            brokers: [.init(host: "rabbit.example", port: 5672)],
            authentication: .plain(user: "a", passwordFile: "/nonexistent"))
        #expect(failure { try configuration.validate() }?.code == .failedPrecondition)
        configuration.allowsPlaintext = true
        try configuration.validate()
        configuration.allowsPlaintext = false
        configuration.tls = .init(authorities: "/nonexistent")
        try configuration.validate()
        configuration.authentication = .external
        #expect(failure { try configuration.validate() }?.code == .failedPrecondition)
    }

    @Test func workersMayOnlyDoTheirOwn() async throws {
        let broker = try Broker.current
        let names = Names()
        try await withBus(broker.configuration()) { coordinator in
            try await coordinator.declare(names.topology(hosts: ["kvm1", "kvm2"]))
            try await withBus(broker.configuration("kvm1")) { worker in
                func publish(_ exchange: String, _ key: String, user: String = "") async throws -> MigrationError.Code?
                {
                    var message = Message(exchange: exchange, routingKey: key, body: [])
                    message.userID = user
                    return try await code { try await worker.publish(message) }
                }
                #expect(try await publish(names.events, "evt.kvm1.accepted", user: "kvm1") == nil)
                #expect(try await publish(names.events, "evt.kvm2.accepted") == .permissionDenied)
                #expect(try await publish(names.tasks, "kvm1") == .permissionDenied)
                #expect(try await publish("", names.tasks(of: "kvm2")) == .permissionDenied)
                #expect(try await publish(names.events, "evt.kvm1.accepted", user: "kvm2") == .failedPrecondition)
                #expect(
                    try await code { try await worker.declare(names.topology(hosts: ["kvm3"])) } == .permissionDenied)
                #expect(
                    try await code { _ = try await worker.subscribe(names.tasks(of: "kvm2"), prefetch: 1) }
                        == .permissionDenied)
                _ = try await worker.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
                #expect(worker.status.isHealthy)
            }
        }
    }

    /// The broker ends the channel of a forged message without saying which one it was.
    @Test func forgedUserFailsThatMessageAlone() async throws {
        let names = Broker.names()
        try await withBus(try Broker.current.configuration()) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let refused: [Int] = await withTaskGroup(of: Int?.self) { group in
                for number in 0..<300 {
                    group.addTask {
                        var message = Message(exchange: names.tasks, routingKey: "kvm1", body: [])
                        message.messageID = "\(number)"
                        if number % 100 == 50 { message.userID = "kvm1" }
                        return (try? await code { try await bus.publish(message) }) == .failedPrecondition
                            ? number : nil
                    }
                }
                return await group.reduce(into: []) { if let number = $1 { $0.append(number) } }
            }
            #expect(refused.sorted() == [50, 150, 250])
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1000)
            var seen: Set<String> = []
            var iterator = subscription.deliveries.makeAsyncIterator()
            while seen.count < 297 { seen.insert(try await iterator.delivery().message.messageID) }
            #expect(seen.isDisjoint(with: ["50", "150", "250"]))
        }
    }
}
