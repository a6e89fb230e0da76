import ArgumentParser
import Enrollment
import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import Worker

/// What a member of the fleet needs besides its host: keys, certificate, broker, and clocks that agree.
extension Examination {
    mutating func examine(worker path: String) async {
        do {
            let file = try WorkerFile(path: path)
            note("configuration", .pass, "\(path), host \(file.host)")
            let names = file.worker.names
            let member = examineKeys(file.keys, of: file.host)
            examineCertificate(file.broker)
            await examineBroker(
                file.broker, consumes: [names.tasks(of: file.host), names.control(of: file.host)],
                while: "flotilla-worker", writes: names.events
            ) { bus in
                if let member { try await EventPublisher(bus: bus, names: names, member: member).probe() }
            }
            await examineHost(libvirt: file.worker.libvirtURI, pools: file.worker.pools)
        } catch { note("configuration", error, remedy: "correct that, then ask again") }
    }

    mutating func examine(coordinator path: String) async {
        do {
            let file = try CoordinatorConfiguration(path: path)
            note("configuration", .pass, path)
            examineClock()
            _ = examineKeys(file.keys, of: FleetMember.coordinator)
            examineCertificate(file.broker)
            let names = file.names
            await examineBroker(
                file.broker, consumes: [names.coordinatorEvents], while: "flotilla-coordinator", reads: [names.dead],
                writes: names.tasks
            ) { bus in
                // Where it may write, a message to a host that can't exist is returned; where it may not, refused.
                do {
                    try await bus.publish(Message(exchange: names.tasks, routingKey: "-", body: []))
                } catch let error as MigrationError where error.code == .notFound {}
            }
            await examineHosts(socket: file.socket)
        } catch { note("configuration", error, remedy: "correct that, then ask again") }
    }

    private mutating func examineKeys(_ keys: KeyFiles, of name: String) -> FleetMember? {
        do {
            let member = try keys.member(named: name)
            let believed = try member.believed().filter { $0 != name }
            let wanted = name == FleetMember.coordinator ? "hosts" : "the coordinator"
            if believed.isEmpty {
                note("keys", .fail, "\(keys.trusted) holds no key of \(wanted)", "enroll: see flotilla fleet --help")
            } else {
                note("keys", .pass, "own key readable by its owner alone; believes \(believed.joined(separator: ", "))")
            }
            return member
        } catch {
            note("keys", error)
            return nil
        }
    }

    private mutating func examineCertificate(_ configuration: AMQPConfiguration) {
        guard let path = configuration.tls?.certificate else { return }
        do {
            let end = try Enrollment.expiry(ofCertificate: path)
            let days = (end.milliseconds - Moment.now.milliseconds) / 86_400_000
            let found = end < .now ? "\(path) ended \(age(end)) ago" : "\(path) is good for \(days) days"
            let verdict: Verdict = end < .now ? .fail : days < 30 ? .warn : .pass
            note("certificate", verdict, found, verdict == .pass ? nil : "enroll again: see flotilla fleet --help")
        } catch { note("certificate", error) }
    }

    /// Logs in, and does what this member has to be able to do, to no effect.
    ///
    /// - Parameter service: consumes some of the queues it reads all the time.
    private mutating func examineBroker(
        _ configuration: AMQPConfiguration, consumes consumed: [String], while service: String,
        reads others: [String] = [], writes exchange: String, _ write: @Sendable (AMQPBus) async throws -> Void
    ) async {
        let place = configuration.brokers.map(\.description).joined(separator: ", ")
        do {
            let bus = try AMQPBus(configuration)
            do {
                let depths = try await bus.depths(of: consumed + others)
                note("broker", .pass, "\(place): logged in\(configuration.tls == nil ? " without TLS" : " by TLS")")
                if configuration.tls == nil {
                    note("encryption", .warn, "messages and passwords can be read on the way", "configure broker.tls")
                }
                for queue in consumed { await examine(queue, depths[queue], consumedBy: service, bus) }
                for queue in others { await examine(queue, depths[queue], consumedBy: nil, bus) }
                do {
                    try await write(bus)
                    note("exchange \(exchange)", .pass, "may be written to")
                } catch { note("exchange \(exchange)", error) }
                note(
                    "consumer_timeout", .unknown, "a setting of each broker node, which tells it to no client",
                    "on each node, rabbitmqctl environment | grep consumer_timeout: what is delivered is acknowledged within seconds, "
                        + "so the default of 30 minutes is right; below 60000 (ms) busy members lose their consumers")
            } catch { note("broker", error) }
            await bus.close()
        } catch { note("broker", error) }
    }

    private mutating func examine(
        _ queue: String, _ depth: QueueDepth?, consumedBy service: String?, _ bus: AMQPBus
    ) async {
        guard let depth else {
            return note(
                "queue \(queue)", .fail, "does not exist",
                "start the coordinator, or import the definitions: flotilla fleet definitions")
        }
        do {
            try await bus.requireReadable(queue)
            let found = "may be read, " + (depth.ready == 0 ? "empty" : "\(depth.ready) waiting")
            if let service, depth.consumers == 0 {
                note(
                    "queue \(queue)", .warn, "\(found), nothing consumes it",
                    "its service does while it runs: systemctl status \(service)")
            } else {
                note("queue \(queue)", .pass, service == nil ? found : "\(found), consumed")
            }
        } catch { note("queue \(queue)", error) }
    }

    /// What the coordinator has heard of its hosts, and how their clocks differ from its own.
    private mutating func examineHosts(socket: String) async {
        do {
            let fleet = try FleetOptions.parse(["--socket", socket])
            let hosts = try await fleet.connect { try await $0.listHosts(.init()) }.hosts
            for host in hosts {
                note(host, quietFor: Duration.milliseconds(Moment.now.milliseconds - host.seenAt.moment.milliseconds))
                if !host.forgotten { noteClock(of: host) }
            }
            if hosts.isEmpty { note("hosts", .warn, "no worker was heard of yet", "see flotilla fleet --help") }
        } catch let error as MigrationError where error.code == .unavailable {
            note("hosts", .unknown, "the coordinator does not answer: \(error.message)", "start it, then ask again")
        } catch { note("hosts", error) }
    }

    private mutating func note(_ host: Host, quietFor silence: Duration) {
        let name = host.profile.name
        if host.forgotten {
            note("host \(name)", .warn, Host.forgottenText, Host.forgottenRemedy)
        } else if host.hasSeenAt, silence < .seconds(120) {
            note("host \(name)", .pass, "heard of \(age(host.seenAt.moment)) ago")
        } else {
            note(
                "host \(name)", .warn,
                host.hasSeenAt ? "not heard of for \(age(host.seenAt.moment))" : "never heard of",
                "on \(name): systemctl status flotilla-worker; flotilla doctor --worker FILE")
        }
    }

    private mutating func noteClock(of host: Host) {
        let subject = "clock of \(host.profile.name)"
        guard host.hasClockAheadMs else {
            return note(
                subject, .unknown, "nothing was heard of it since the coordinator started",
                "ask again once its worker runs")
        }
        let difference = Duration.milliseconds(abs(host.clockAheadMs))
        let remedy =
            "set both clocks by NTP (chrony, systemd-timesyncd): what is signed more than "
            + "\(FleetMember.clockTolerance.components.seconds) s in the future is refused, and heartbeats that are older "
            + "than a lease count for nothing"
        let verdict: Verdict =
            difference > FleetMember.clockTolerance
            ? .fail : difference > FleetMember.clockTolerance / 6 ? .warn : .pass
        note(subject, verdict, "\(host.clockText), by the coordinator's", verdict == .pass ? nil : remedy)
    }
}
