import Foundation
import Glibc
import HostKit
import TestKit
import Testing

extension Integration {
    /// How the fleet's services start, and don't: without a broker, with files that can't be right, with a signal.
    @Suite(.serialized) struct Start {
        /// Keys and configurations of a coordinator and a worker, with the broker's part as given.
        private struct Services {
            let folder: TemporaryFolder
            var path: String { folder.path }

            init(_ broker: String) throws {
                folder = try TemporaryFolder()
                try require(
                    Environment.flotilla(), "fleet", "init", "--dir", "\(folder.path)/keys")
                try Files.createDirectories("\(folder.path)/pool")
                try Files.writeAtomically(Array("secret\n".utf8), to: "\(folder.path)/password")
                let keys = """
                    keys: {own: \(folder.path)/keys/signing.key, trusted: \(folder.path)/keys/trusted}
                    broker: {\(broker.replacing("DIR", with: folder.path))}

                    """
                try write("coordinator", "\(keys)state: \(folder.path)/c\nsocket: \(folder.path)/socket\n")
                try write(
                    "worker",
                    "host: kvm1\n\(keys)state: \(folder.path)/w\nlibvirt: test:///default\n"
                        + "pools: [{name: default, path: \(folder.path)/pool}]\n")
            }

            func write(_ role: String, _ text: String) throws {
                try Files.writeAtomically(Array(text.utf8), to: "\(path)/\(role).yaml")
            }

            func start(_ role: String, for seconds: Double? = nil) throws -> Outcome {
                try run(
                    Environment.flotilla(), [role, "--config", "\(path)/\(role).yaml"], limit: 20, killAfter: seconds,
                    signal: SIGTERM)
            }
        }

        /// They wait for it and say why, once, and end at once when they are asked to.
        @Test(arguments: ["coordinator", "worker"])
        func brokerThatIsAway(_ role: String) throws {
            let services = try Services("addresses: ['localhost:1'], plaintext: true, password-file: DIR/password")
            let outcome = try services.start(role, for: 3)
            #expect(outcome.status == 0 && outcome.seconds < 4, "\(outcome.seconds) s: \(outcome.errors)")
            let lines = outcome.errors.split(separator: "\n").filter { $0.contains("not connected") }
            #expect(lines.count == 1, "\(outcome.errors)")
            #expect(lines.first?.contains("broker localhost:1 can't be reached: Connection refused") == true)
            #expect(!outcome.errors.contains("broker=-") && outcome.errors.contains("ended before it served"))
        }

        /// One that takes the connection and never says a word.
        @Test(arguments: ["coordinator", "worker"])
        func brokerThatIsSilent(_ role: String) throws {
            let listener = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
            defer { close(listener) }
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
            var size = socklen_t(MemoryLayout<sockaddr_in>.size)
            withUnsafeMutablePointer(to: &address) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    #expect(bind(listener, $0, size) == 0 && listen(listener, 8) == 0)
                    #expect(getsockname(listener, $0, &size) == 0)
                }
            }
            let port = UInt16(bigEndian: address.sin_port)
            let services = try Services(
                "addresses: ['127.0.0.1:\(port)'], plaintext: true, password-file: DIR/password")
            let outcome = try services.start(role, for: 2)
            #expect(outcome.status == 0 && outcome.seconds < 3, "\(outcome.seconds) s: \(outcome.errors)")
        }

        /// What no connection can be made with is refused, with the setting, the file and what to do.
        @Test(arguments: [
            ("tls: {ca: DIR/none.pem}, password-file: DIR/password", "broker.tls.ca: open DIR/none.pem"),
            ("tls: {ca: DIR/worker.yaml}, password-file: DIR/password", "DIR/worker.yaml holds no certificate in PEM"),
            (
                "tls: {ca: DIR/keys/ca.pem, certificate: DIR/keys/tls.pem, key: DIR/keys/ca.key}",
                "DIR/keys/tls.pem and DIR/keys/ca.key are not a PEM certificate and its key"
            ),
            ("plaintext: true, password-file: DIR/none", "broker.password-file: open DIR/none"),
            ("plaintext: true, password-file: DIR/pool", "broker.password-file: secret DIR/pool is not a plain file"),
        ])
        func filesThatCannotBeRight(_ broker: String, _ message: String) throws {
            let services = try Services("addresses: ['localhost:1'], \(broker)")
            for role in ["coordinator", "worker"] {
                let outcome = try services.start(role)
                #expect(outcome.status == 1, "\(outcome.errors)")
                #expect(outcome.errors.contains(message.replacing("DIR", with: services.path)), "\(outcome.errors)")
                #expect(outcome.errors.split(separator: "\n").count == 2, "\(outcome.errors)")
            }
        }

        /// A misspelt setting is missing under its right name: the mistake is told, wherever it is.
        @Test func misspeltSettings() throws {
            let services = try Services("adresses: ['localhost:1'], tls: {authority: DIR/ca.pem}")
            let outcome = try services.start("worker")
            #expect(outcome.errors.contains("broker.adresses is not a setting"), "\(outcome.errors)")
            try services.write("worker", "broker: {tls: {authority: /ca.pem}}\n")
            let nested = try services.start("worker")
            #expect(nested.errors.contains("worker.yaml:1: broker.tls.authority is not a setting"), "\(nested.errors)")
            #expect(nested.errors.contains("settings here are ca, certificate, key"))
            try services.write("worker", "broker: {}\npools: [{nam: x}]\n")
            #expect(try services.start("worker").errors.contains("pools.nam is not a setting"))
            try services.write("worker", "broker: {}\n")
            #expect(try services.start("worker").errors.contains("setting host is missing"))
            try services.write("worker", "host: kvm1\nbroker: {user: me}\n")
            #expect(try services.start("worker").errors.contains("broker.user goes with password-file"))
        }

        /// A key that belongs to somebody else: whose it is, who runs this, and how to change that.
        @Test(.enabled(if: geteuid() == 0)) func keyOfSomebodyElse() throws {
            let services = try Services("addresses: ['localhost:1'], plaintext: true, password-file: DIR/password")
            let key = "\(services.path)/keys/signing.key"
            chown(key, 65534, 65534)
            let outcome = try services.start("coordinator")
            #expect(outcome.status == 1)
            #expect(outcome.errors.contains("secret \(key) belongs to nobody, and root runs this"), "\(outcome.errors)")
            #expect(outcome.errors.contains("chown root \(key)"))
        }

        @Test(arguments: [
            ["host", "forget", "a/b"], ["host", "drain", "a b"], ["host", "show", "-a"],
            ["worker", "enroll", "--host", "a b"],
            ["fleet", "definitions", "--requester", "a b"], ["fleet", "definitions", "--host", "a b"],
            ["migration", "submit", "ova:/a.ova", "--pool", "p", "--host", "a b"],
        ])
        func namesThatCannotBe(_ words: [String]) throws {
            let outcome = try run(Environment.flotilla(), words)
            #expect(outcome.status == 2, "\(outcome.errors)")
        }

        /// The names at the broker are those of the coordinator's configuration beside the keys.
        @Test func forgettingSaysWhatIsLeftToDo() throws {
            let services = try Services(
                "addresses: ['localhost:1'], plaintext: true, password-file: DIR/password, virtual-host: lab")
            let keys = "\(services.path)/keys"
            try Files.writeAtomically(
                try Files.read("\(services.path)/coordinator.yaml"), to: "\(keys)/coordinator.yaml", mode: 0o644)
            try Files.createDirectories("\(keys)/trusted/kvm1")
            let outcome = try run(Environment.flotilla(), ["host", "forget", "kvm1", "--dir", keys])
            #expect(outcome.status == 0, "\(outcome.errors)")
            for command in [
                "systemctl disable --now flotilla-worker", "rabbitmqctl delete_user kvm1",
                "rabbitmqctl delete_queue --vhost lab flotilla.tasks.kvm1",
                "rabbitmqctl delete_queue --vhost lab flotilla.control.kvm1",
            ] { #expect(outcome.output.contains(command), "\(outcome.output)") }
        }
    }
}
