import Enrollment
import Foundation
import Glibc
import HostKit
import Messaging
import MigrationModel
import TestKit
import Testing

@Suite struct EnrollmentTests {
    /// A coordinator's folder and a host's, as after `fleet init` and `worker enroll`.
    struct Rig {
        let folder: TemporaryFolder
        let coordinator: FleetFolder
        let host: FleetFolder

        init(makesFleet: Bool = true) throws {
            folder = try TemporaryFolder()
            coordinator = FleetFolder("\(folder.path)/coordinator")
            host = FleetFolder("\(folder.path)/host")
            if makesFleet { try Enrollment.makeFleet(in: coordinator) }
        }

        /// Paths of all files, with what they hold.
        func files() throws -> [String: [UInt8]] {
            var found: [String: [UInt8]] = [:]
            func add(_ path: String) throws {
                guard Files.isDirectory(path) else { return found[path] = try Files.read(path) }
                for name in try Files.list(path) { try add("\(path)/\(name)") }
            }
            try add(folder.path)
            return found
        }

        func openssl(_ arguments: String...) throws -> String {
            let process = Process()
            process.executableURL = URL(filePath: "/usr/bin/openssl")
            process.arguments = arguments
            let output = Pipe()
            process.standardOutput = output
            process.standardError = output
            try process.run()
            let text = try output.fileHandleForReading.readToEnd() ?? Data()
            process.waitUntilExit()
            return String(decoding: text, as: UTF8.self)
        }
    }

    /// Both sides then believe each other's messages, and OpenSSL the certificates.
    @Test func hostJoins() throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        let answer = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        #expect(answer.host == "kvm1" && answer.keyID == request.keyID)
        #expect(try Enrollment.accept(answer.json, in: rig.host).host == "kvm1")
        #expect(try rig.coordinator.hosts() == ["kvm1"])

        let coordinator = FleetMember(
            name: FleetMember.coordinator, key: try SigningKey(path: rig.coordinator.signingKey),
            believes: try KeyRing(folder: rig.coordinator.trusted))
        let worker = FleetMember(
            name: "kvm1", key: try SigningKey(path: rig.host.signingKey),
            believes: try KeyRing(folder: rig.host.trusted))
        for (sender, receiver) in [(coordinator, worker), (worker, coordinator)] {
            var message = Message(exchange: "", routingKey: "", body: [1, 2])
            sender.sign(&message, for: receiver.name, validity: .seconds(60))
            #expect(try receiver.verify(message) == sender.name)
        }
        let verified = try rig.openssl(
            "verify", "-purpose", "sslclient", "-CAfile", rig.host.authority, rig.host.certificate,
            rig.coordinator.certificate)
        #expect(verified == "\(rig.host.certificate): OK\n\(rig.coordinator.certificate): OK\n")
        #expect(
            try rig.openssl("x509", "-in", rig.host.certificate, "-noout", "-subject", "-nameopt", "multiline")
                .contains("commonName                = kvm1"))
        for secret in [rig.host.signingKey, rig.host.tlsKey, rig.coordinator.authorityKey] {
            #expect(try Files.readSecret(secret).isEmpty == false)
        }
    }

    @Test func brokersCertificateServes() throws {
        let rig = try Rig()
        let target = "\(rig.folder.path)/rabbit1.example.org"
        let (path, key) = try Enrollment.brokerCertificate("rabbit1.example.org", in: rig.coordinator, to: target)
        #expect(path == "\(target).pem" && key == "\(target).key")
        let secret = String(decoding: try Files.readSecret(key), as: UTF8.self)
        #expect(secret.hasPrefix("-----BEGIN PRIVATE KEY-----"))
        let again = failure { try Enrollment.brokerCertificate("rabbit1.example.org", in: rig.coordinator, to: target) }
        #expect(again?.code == .alreadyExists)
        let verified = try rig.openssl(
            "verify", "-purpose", "sslserver", "-verify_hostname", "rabbit1.example.org", "-CAfile",
            rig.coordinator.authority, path)
        #expect(verified == "\(path): OK\n")
        #expect(
            try rig.openssl("verify", "-purpose", "sslclient", "-CAfile", rig.coordinator.authority, path)
                .contains("unsuitable"))
    }

    /// A request whose parts don't belong together is refused, and nobody is believed for it.
    @Test(arguments: ["host", "signingKey", "certificateRequest", "proof", "all"])
    func forgedRequests(_ part: String) throws {
        let rig = try Rig()
        let other = FleetFolder("\(rig.folder.path)/other")
        let mine = try Enrollment.ask(host: "kvm1", in: rig.host).json
        let theirs = try Enrollment.ask(host: "kvm2", in: other).json
        var object = try #require(try JSONSerialization.jsonObject(with: Data(mine)) as? [String: String])
        let foreign = try #require(try JSONSerialization.jsonObject(with: Data(theirs)) as? [String: String])
        if part == "all" { object = [:] } else { object[part] = foreign[part] }
        let forged = Array(try JSONSerialization.data(withJSONObject: object))
        let error = failure { try Enrollment.grant(forged, in: rig.coordinator, replaces: false) }
        #expect(error?.code == (part == "all" ? .invalidArgument : .unauthenticated))
        #expect(try rig.coordinator.hosts().isEmpty)
    }

    /// Names with dots share words of routing keys and queues with shorter ones, and '.' is any letter to a pattern.
    @Test func permissionsOfHostsDoNotOverlap() throws {
        struct Definitions: Decodable {
            struct Permission: Decodable { let user, write, read: String }
            let permissions, topicPermissions: [Permission]
        }
        let hosts = ["kvm1", "kvm1.lab", "kvm1.lab.x", "kvm10", "kvm1xlab", "1"]
        let names = Names()
        let json = try BrokerDefinitions(names, hosts: hosts, virtualHost: "/").json()
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        let made = try decoder.decode(Definitions.self, from: Data(json.utf8))
        func allows(_ pattern: String, _ text: String) -> Bool {
            text.range(of: pattern, options: .regularExpression) != nil
        }
        for host in hosts {
            let may = try #require(made.permissions.first { $0.user == host })
            let speaks = try #require(made.topicPermissions.first { $0.user == host })
            for other in hosts {
                for queue in [names.tasks(of: other), names.control(of: other)] {
                    #expect(allows(may.read, queue) == (other == host), "\(host) reads \(queue)")
                }
                for kind in ["task", "inventory", "heartbeat", "rejected"] {
                    let key = names.eventKey(host: other, kind: kind)
                    #expect(allows(speaks.write, key) == (other == host), "\(host) says \(key)")
                }
            }
            for exchange in [
                "", names.tasks, names.control, names.requests, names.dead, "flotilla-events", "amq.topic",
            ] {
                #expect(!allows(may.write, exchange), "\(host) writes to '\(exchange)'")
            }
            #expect(allows(may.write, names.events))
        }
    }

    /// Each queue of the fleet has the room of one policy, which general policies don't get at; other programs' have none.
    @Test(arguments: ["flotilla", "lab.x"]) func policiesGiveQueuesRoom(_ namespace: String) throws {
        struct Definitions: Decodable {
            struct Policy: Decodable {
                let name, vhost, pattern, applyTo: String
                let definition: [String: Int]
                let priority: Int

                enum CodingKeys: String, CodingKey {
                    case name, vhost, pattern, definition, priority
                    case applyTo = "apply-to"
                }
            }
            let policies: [Policy]
        }
        let names = Names(namespace: namespace)
        let json = try BrokerDefinitions(names, hosts: ["kvm1"], requesters: ["ops"], virtualHost: "v").json()
        let policies = try JSONDecoder().decode(Definitions.self, from: Data(json.utf8)).policies
        func room(_ queue: String) -> [Int?] {
            policies.filter { queue.range(of: $0.pattern, options: .regularExpression) != nil }
                .map { $0.definition["max-length-bytes"] }
        }
        for queue in names.topology(hosts: ["kvm1", "kvm1.lab"]).queues.map(\.name) {
            #expect(room(queue) == [queue == names.dead ? 256 << 20 : 1 << 30], "\(queue)")
        }
        for queue in ["ops.answers", "labsx.requests", "my.\(names.requests)", "\(names.dead).mine"] {
            #expect(room(queue) == [], "\(queue)")
        }
        #expect(policies.allSatisfy { $0.vhost == "v" && $0.applyTo == "queues" && $0.priority > 0 })
    }

    /// A requester's name is a broker user's, and what its queues begin with.
    @Test(arguments: [
        ["flotilla"], ["flotilla.tasks"], ["lab"], ["coordinator"], ["kvm1"], ["ops", "ops"], ["ops team"], [""],
    ])
    func requesterWithSomebodyElsesName(_ requesters: [String]) {
        let names = Names(namespace: requesters == ["lab"] ? "lab.flotilla" : "flotilla")
        func make(_ requesters: [String]) -> MigrationError? {
            failure { try BrokerDefinitions(names, hosts: ["kvm1"], requesters: requesters, virtualHost: "/") }
        }
        #expect(make(requesters)?.code == .invalidArgument)
        #expect(make(["ops", "flotilla-ops", "kvm10"]) == nil)
    }

    @Test func keysChangeWithAnOverlap() throws {
        let rig = try Rig()
        let first = try Enrollment.ask(host: "kvm1", in: rig.host)
        _ = try Enrollment.grant(first.json, in: rig.coordinator, replaces: false)
        try Files.remove(rig.host.signingKey)
        let second = try Enrollment.ask(host: "kvm1", in: rig.host)
        #expect(first.keyID != second.keyID)
        _ = try Enrollment.grant(second.json, in: rig.coordinator, replaces: false)
        let ring = try KeyRing(folder: rig.coordinator.trusted)
        #expect(try ring.key(first.keyID, of: "kvm1") != nil && ring.key(second.keyID, of: "kvm1") != nil)
        #expect(try rig.coordinator.forget("kvm1", except: second.keyID) == [first.keyID])
        #expect(try KeyRing(folder: rig.coordinator.trusted).key(first.keyID, of: "kvm1") == nil)
    }

    /// Those in use stay until the answer comes; it may be taken twice, as after a crash.
    @Test func newKeysTakeTheirPlaceWithTheAnswer() throws {
        let rig = try Rig()
        let first = try Enrollment.ask(host: "kvm1", in: rig.host)
        let answer = try Enrollment.grant(first.json, in: rig.coordinator, replaces: false).json
        #expect(try Enrollment.accept(answer, in: rig.host).newKeyID == nil)
        let before = try rig.files().filter { $0.key.hasPrefix(rig.host.path) }
        let second = try Enrollment.ask(host: "kvm1", in: rig.host, newKeys: true)
        #expect(try Enrollment.ask(host: "kvm1", in: rig.host, newKeys: true).keyID == second.keyID)
        #expect(second.keyID != first.keyID)
        let during = try rig.files()
        #expect(before.allSatisfy { during[$0.key] == $0.value })
        let next = try Enrollment.grant(second.json, in: rig.coordinator, replaces: false).json
        #expect(try Enrollment.accept(next, in: rig.host).newKeyID == second.keyID)
        #expect(try SigningKey(path: rig.host.signingKey).publicKey.id == second.keyID)
        #expect(try Files.list(rig.host.path).allSatisfy { !$0.hasSuffix(".new") })
        #expect(try Enrollment.accept(next, in: rig.host).newKeyID == nil)
        #expect(failure { try Enrollment.accept(answer, in: rig.host) }?.code == .failedPrecondition)
    }

    /// One file of enrollment is taken for another.
    @Test func wrongFileIsNamed() throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host).json
        let answer = try Enrollment.grant(request, in: rig.coordinator, replaces: false).json
        for (bytes, what) in [
            (answer, "but an answer"), ([], "it is empty"), (Array("{}".utf8), "no host's request"),
            (try Files.read(rig.coordinator.certificate), "but PEM: CERTIFICATE"),
        ] {
            let error = failure { try Enrollment.grant(bytes, named: "a.file", in: rig.coordinator, replaces: false) }
            #expect(error?.code == .invalidArgument && error?.message.hasPrefix("a.file holds no") == true)
            #expect(error?.message.contains(what) == true && error?.cause == nil, "\(what)")
            #expect(error?.hint?.contains("flotilla worker enroll --host") == true)
        }
        let error = failure { try Enrollment.accept(request, named: "a.file", in: rig.host) }
        #expect(error?.message.contains("but a request") == true)
        #expect(error?.hint?.contains("flotilla host enroll") == true)
    }

    @Test func answerForOtherKeysIsRefused() throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        let answer = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        try Files.remove(rig.host.tlsKey)
        _ = try Enrollment.ask(host: "kvm1", in: rig.host)
        #expect(failure { try Enrollment.accept(answer.json, in: rig.host) }?.code == .failedPrecondition)
        #expect(!Files.exists(rig.host.certificate))
    }
}
