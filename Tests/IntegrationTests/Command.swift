import Foundation
import HostKit
import MigrationModel
import Synchronization
import TestKit
import Testing

/// A finished process.
struct Outcome {
    /// Exit code; of a killed process, minus the signal.
    var status: Int32
    var output: String
    var errors: String
    var seconds: Double
}

/// Runs a program to its end. Output goes through files, so that no pipe can fill up and no daemon that the program
/// leaves behind is waited for.
///
/// - Parameters:
///   - killAfter: seconds after which it gets `signal`, unless it has ended.
///   - signal: one that asks it to end is given `limit` to be obeyed.
@discardableResult
func run(
    _ program: String, _ arguments: [String], environment: [String: String] = [:], limit: Double = 300,
    killAfter: Double? = nil, signal: Int32 = SIGKILL
) throws -> Outcome {
    let folder = try TemporaryFolder()
    let (out, err) = ("\(folder.path)/out", "\(folder.path)/err")
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_addopen(&actions, 1, out, O_WRONLY | O_CREAT, 0o600)
    posix_spawn_file_actions_addopen(&actions, 2, err, O_WRONLY | O_CREAT, 0o600)
    let variables = ProcessInfo.processInfo.environment.merging(environment) { $1 }.map { "\($0)=\($1)" }
    var argv = ([program] + arguments).map { strdup($0) } + [nil]
    var envp = variables.map { strdup($0) } + [nil]
    defer { for text in argv + envp { free(text) } }

    let started = ContinuousClock.now
    var pid: pid_t = 0
    let spawned = posix_spawn(&pid, program, &actions, nil, &argv, &envp)
    guard spawned == 0 else { throw systemError("start", program, errno: spawned) }
    let child = pid
    let ended = DispatchSemaphore(value: 0)
    let status = Mutex<Int32>(0)
    spawnThread("waitpid") {
        var raw: Int32 = 0
        while waitpid(child, &raw, 0) < 0 && errno == EINTR {}
        status.withLock { $0 = raw }
        ended.signal()
    }
    if ended.wait(timeout: .now() + (killAfter ?? limit)) == .timedOut {
        if killAfter != nil { kill(child, signal) }
        if killAfter == nil || ended.wait(timeout: .now() + limit) == .timedOut {
            kill(child, SIGKILL)
            ended.wait()
            throw MigrationError(.deadlineExceeded, "\(program) \(arguments) took more than \(limit) s")
        }
    }
    let raw = status.withLock { $0 }
    let killed = raw & 0x7f
    func text(_ path: String) throws -> String {
        String(decoding: try Files.read(path, limit: 64 << 20), as: UTF8.self)
    }
    return Outcome(
        status: killed == 0 ? (raw >> 8) & 0xff : -killed, output: try text(out), errors: try text(err),
        seconds: Double((ContinuousClock.now - started).milliseconds) / 1000)
}

/// Runs a program that must succeed, and returns its output.
@discardableResult
func require(_ program: String, _ arguments: String..., sourceLocation: SourceLocation = #_sourceLocation) throws
    -> String
{
    let path = program.hasPrefix("/") ? program : "/usr/bin/\(program)"
    let outcome = try run(path, arguments)
    try #require(
        outcome.status == 0, "\(program) \(arguments): \(outcome.output)\(outcome.errors)",
        sourceLocation: sourceLocation)
    return outcome.output
}

/// What the test run was given to work on; `make test` sets it.
enum Environment {
    /// The program under test.
    static func flotilla() throws -> String { try variable("FLOTILLA_TEST_BIN") }
    /// The folder of the bootable guests.
    static func guests() throws -> String { try variable("FLOTILLA_TEST_GUEST") }

    static var testbeds: String {
        // .../Tests/IntegrationTests/Command.swift
        URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent().path + "/testbeds"
    }

    private static func variable(_ name: String) throws -> String {
        try #require(
            ProcessInfo.processInfo.environment[name], "\(name) is not set: run the tests with `make test`")
    }
}
