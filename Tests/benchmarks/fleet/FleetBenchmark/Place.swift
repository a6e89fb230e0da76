import ArgumentParser
import FoundationEssentials
import Glibc
import HostKit
import Logging
import Messaging
import MessagingAMQP
import MigrationModel

/// Where a process finds its keys, its broker and its files.
struct Place: ParsableArguments {
    @Option(help: "Folder of keys and state.") var dir: String
    @Option(help: "The broker's port on 127.0.0.1.") var port: Int
    @Option(help: "Folder that holds the password of each broker user.") var passwords: String

    func member(_ name: String) throws -> FleetMember {
        FleetMember(
            name: name, key: try SigningKey(path: "\(dir)/keys/\(name).key"),
            believes: try KeyRing(folder: "\(dir)/trusted/\(name == FleetMember.coordinator ? name : "host")"))
    }

    func bus(user: String) throws -> AMQPBus {
        var configuration = AMQPConfiguration(
            brokers: [.init(host: "127.0.0.1", port: port)], tls: nil,
            authentication: .plain(user: user, passwordFile: "\(passwords)/\(user)"))
        configuration.allowsPlaintext = true
        return try AMQPBus(configuration)
    }

    /// Celery's workers log no line per task either.
    func logger(_ name: String) -> Logger {
        var logger = Logger(label: name) { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = .warning
        return logger
    }
}

/// Makes keys for a coordinator and hosts kvm1 to kvmN that know each other.
struct KeysCommand: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "keys")
    @Option var dir: String
    @Option var hosts: Int

    func run() throws {
        try Files.createDirectories("\(dir)/keys", mode: 0o700)
        for name in [FleetMember.coordinator] + (1...hosts).map({ "kvm\($0)" }) {
            let key = SigningKey()
            let believer = name == FleetMember.coordinator ? "host" : FleetMember.coordinator
            try Files.createDirectories("\(dir)/trusted/\(believer)/\(name)", mode: 0o700)
            try Files.writeAtomically(key.pem, to: "\(dir)/keys/\(name).key", mode: 0o600)
            try Files.writeAtomically(key.publicKey.pem, to: "\(dir)/trusted/\(believer)/\(name)/1.pem", mode: 0o644)
        }
    }
}

/// Answers lines of standard input until it ends; then this process does too.
func obey(_ answer: @escaping @Sendable ([String]) async throws -> String) async throws {
    print("{}")
    fflush(nil)
    while let line = try await blocking("input", { readLine() }) {
        print(try await answer(line.split(separator: " ").map(String.init)))
        fflush(nil)
    }
}

/// CPU time in seconds, resident and proportional memory in KiB, and a count of the process's own.
func usage(_ count: Int = 0) throws -> String {
    var usage = rusage()
    getrusage(__rusage_who_t(0), &usage)
    func seconds(_ time: timeval) -> Double { Double(time.tv_sec) + Double(time.tv_usec) / 1e6 }
    let rollup = String(decoding: try Files.read("/proc/self/smaps_rollup", limit: 1 << 16), as: UTF8.self)
    func kibibytes(_ name: String) -> Int {
        rollup.split(separator: "\n").first { $0.hasPrefix("\(name):") }?.split(separator: " ").dropFirst().first
            .flatMap {
                Int($0)
            } ?? 0
    }
    let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime)
    return
        "{\"cpu\": \(cpu), \"rss\": \(kibibytes("Rss")), \"pss\": \(kibibytes("Pss")), \"peak\": \(usage.ru_maxrss), \"count\": \(count)}"
}
