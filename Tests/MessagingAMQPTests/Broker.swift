import Foundation
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import Synchronization
import TestKit
import Testing

/// Brokers of a whole suite, from `Tests/testbeds/rabbitmq/run`: own ports, users and certificates, gone afterwards.
struct PrivateRabbitMQ: SuiteTrait, TestScoping {
    @TaskLocal static var broker: Broker?

    /// `FLOTILLA_TEST_BROKERS=3` runs everything on a cluster instead of a single node.
    static let nodes = Int(ProcessInfo.processInfo.environment["FLOTILLA_TEST_BROKERS"] ?? "1") ?? 1

    /// Around the whole suite, not around each test.
    let isRecursive = false

    func provideScope(
        for test: Test, testCase: Test.Case?, performing function: @concurrent @Sendable () async throws -> Void
    ) async throws {
        let broker = try await Broker(nodes: Self.nodes)
        let result: Result<Void, any Error>
        do {
            try await Self.$broker.withValue(broker) { try await function() }
            result = .success(())
        } catch { result = .failure(error) }
        try await broker.end()
        try result.get()
    }
}

final class Broker: Sendable {
    struct Node: Sendable {
        var port: Int
        var tlsPort: Int
    }

    let folder: TemporaryFolder
    let nodes: [Node]
    private static let script = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .appending(path: "testbeds/rabbitmq/run").path
    private static let namespaces = Mutex(0)

    init(nodes count: Int) async throws {
        let folder = try TemporaryFolder()
        self.folder = folder
        do {
            let lines = try await Self.run(["start", "--tls", "--nodes", "\(count)", "--dir", "\(folder.path)/b"])
            nodes = lines.split(separator: "\n").map { line in
                let numbers = line.split(separator: " ").compactMap { Int($0) }
                return Node(port: numbers[1], tlsPort: numbers[2])
            }
        } catch {
            _ = try? await Self.run(["kill", "--dir", "\(folder.path)/b"])
            throw error
        }
    }

    static var current: Broker { get throws { try #require(PrivateRabbitMQ.broker) } }

    /// Names that no other test uses.
    static func names() -> Names {
        Names(
            namespace: "t"
                + String(
                    namespaces.withLock {
                        $0 += 1
                        return $0
                    }))
    }

    /// stop, kill or start, of all nodes or one.
    @discardableResult
    func control(_ action: String, node: Int? = nil) async throws -> String {
        try await Self.run([action, "--dir", "\(folder.path)/b"] + (node.map { ["--node", "\($0)"] } ?? []))
    }

    @discardableResult
    func ctl(_ arguments: String...) async throws -> String {
        try await Self.run(["ctl", "--dir", "\(folder.path)/b", "--"] + arguments)
    }

    func end() async throws { try await control("kill") }

    func tls(_ name: String) -> String { "\(folder.path)/b/tls/\(name)" }

    /// Plain TCP and a password, with timeouts that suit a test.
    func configuration(_ user: String = "coordinator", ports: [Int]? = nil) -> AMQPConfiguration {
        var configuration = AMQPConfiguration(
            brokers: (ports ?? nodes.map(\.port)).map { .init(host: "localhost", port: $0) },
            authentication: .plain(user: user, passwordFile: "\(folder.path)/b/passwords/\(user)"))
        configuration.heartbeat = .seconds(2)
        configuration.publishTimeout = .seconds(15)
        configuration.requestTimeout = .seconds(5)
        configuration.backoff = Backoff(base: .milliseconds(20), limit: .milliseconds(500))
        return configuration
    }

    func tlsConfiguration(_ user: String, host: String = "localhost", authorities: String = "ca.pem")
        -> AMQPConfiguration
    {
        var configuration = configuration(user)
        configuration.brokers = nodes.map { .init(host: host, port: $0.tlsPort) }
        configuration.tls = .init(
            authorities: tls(authorities), certificate: tls("\(user).pem"), key: tls("\(user).key"))
        configuration.authentication = .external
        return configuration
    }

    /// Output goes through files: a pipe would be held open by the nodes, and its end waited for.
    private static func run(_ arguments: [String]) async throws -> String {
        try await blocking("broker") {
            let outputs = try TemporaryFolder()
            let command = ["sh", "-c", "exec \"$@\" </dev/null >'\(outputs.path)/out' 2>&1", "sh", script] + arguments
            var argv = command.map { strdup($0) } + [nil]
            defer { for text in argv { free(text) } }
            // Threads of a Swift process may block signals, and a node that inherits that can't be asked to end.
            var attributes = posix_spawnattr_t()
            var none = sigset_t()
            sigemptyset(&none)
            posix_spawnattr_init(&attributes)
            defer { posix_spawnattr_destroy(&attributes) }
            posix_spawnattr_setsigmask(&attributes, &none)
            posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
            var pid: pid_t = 0
            let spawned = posix_spawn(&pid, "/bin/sh", nil, &attributes, &argv, environ)
            guard spawned == 0 else { throw systemError("start", script, errno: spawned) }
            var status: Int32 = 0
            while waitpid(pid, &status, 0) < 0, errno == EINTR {}
            let output = String(decoding: try Files.read("\(outputs.path)/out"), as: UTF8.self)
            guard status == 0 else { throw MigrationError(.internal, "\(script) \(arguments): \(output)") }
            return output
        }
    }
}

/// Runs `body` with a bus, which is closed afterwards.
func withBus(_ configuration: AMQPConfiguration, _ body: @Sendable (AMQPBus) async throws -> Void) async throws {
    let bus = try AMQPBus(configuration)
    let result: Result<Void, any Error>
    do { result = .success(try await body(bus)) } catch { result = .failure(error) }
    await bus.close()
    try result.get()
}

/// The code of the `MigrationError` that `body` throws; nil when it throws none.
func code(_ body: () async throws -> Void) async throws -> MigrationError.Code? {
    do {
        try await body()
        return nil
    } catch let error as MigrationError { return error.code }
}

extension AsyncStream<Delivery>.Iterator {
    mutating func delivery(sourceLocation: SourceLocation = #_sourceLocation) async throws -> Delivery {
        let delivery = await next(isolation: #isolation)
        return try #require(delivery, sourceLocation: sourceLocation)
    }
}
