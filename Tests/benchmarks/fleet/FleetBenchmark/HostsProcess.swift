import ArgumentParser
import FlotillaProtocol
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import SwiftProtobuf
import Synchronization

/// Speaks for many hosts, each under its own key: a heartbeat every ten seconds and its inventory every minute, spread
/// evenly over them. `usage` also tells how many messages the broker confirmed.
struct HostsProcess: AsyncParsableCommand {
    static let configuration = CommandConfiguration(commandName: "hosts")
    @OptionGroup var place: Place
    @Option var hosts: Int
    @Option(help: "Broker user that may speak under others' names.") var user: String

    func run() async throws {
        let bus = try place.bus(user: user)
        let sent = Sent()
        try await withThrowingTaskGroup(of: Void.self) { group in
            for number in 1...hosts {
                let member = try place.member("kvm\(number)")
                let events = EventPublisher(bus: bus, names: Names(), member: member)
                let delay = Duration.seconds(10) * (Double(number) / Double(hosts))
                group.addTask {
                    try await Task.sleep(for: delay)
                    var profile = NoOp.profile
                    profile.name = member.name
                    for round in 0... {
                        let next = ContinuousClock.now + .seconds(10)
                        if round % 6 == 0 {
                            profile.capturedAt = Moment.now.timestamp
                            try await events.publish(.inventory(profile))
                            sent.add()
                        }
                        try await events.publish(.heartbeat(HostHeartbeat()))
                        sent.add()
                        try await Task.sleep(until: next, clock: .continuous)
                    }
                }
            }
            group.addTask {
                try await obey { _ in try usage(sent.count) }
            }
            defer { group.cancelAll() }
            try await group.next()
        }
    }
}

private final class Sent: Sendable {
    private let messages = Atomic<Int>(0)

    var count: Int { messages.load(ordering: .relaxed) }
    func add() { messages.add(1, ordering: .relaxed) }
}
