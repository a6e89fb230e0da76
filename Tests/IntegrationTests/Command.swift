import Foundation
import HostKit
import MigrationModel
import Testing

/// A finished process.
struct Outcome {
    /// Exit code; of a killed process, minus the signal.
    var status: Int32
    var output: String
    var errors: String
    var seconds: Double
}

/// Runs a program to its end. Output goes through files, so that no pipe can fill up.
@discardableResult
func run(
    _ program: String, _ arguments: [String], environment: [String: String] = [:], limit: Double = 300,
    killAfter: Double? = nil
) throws -> Outcome {
    let folder = try TemporaryFolderPath()
    let process = Process()
    process.executableURL = URL(fileURLWithPath: program)
    process.arguments = arguments
    process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
    for name in ["out", "err"] { FileManager.default.createFile(atPath: "\(folder.path)/\(name)", contents: nil) }
    let (out, err) = (
        try FileHandle(forWritingTo: URL(fileURLWithPath: "\(folder.path)/out")),
        try FileHandle(forWritingTo: URL(fileURLWithPath: "\(folder.path)/err"))
    )
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = out
    process.standardError = err
    let ended = DispatchSemaphore(value: 0)
    process.terminationHandler = { _ in ended.signal() }
    let started = ContinuousClock.now
    try process.run()
    if let killAfter, ended.wait(timeout: .now() + killAfter) == .timedOut {
        kill(process.processIdentifier, SIGKILL)
        ended.wait()
    } else if killAfter == nil, ended.wait(timeout: .now() + limit) == .timedOut {
        kill(process.processIdentifier, SIGKILL)
        ended.wait()
        throw MigrationError(.deadlineExceeded, "\(program) \(arguments) took more than \(limit) s")
    }
    let seconds = Double((ContinuousClock.now - started).milliseconds) / 1000
    func text(_ name: String) throws -> String {
        String(decoding: try Files.read("\(folder.path)/\(name)", limit: 64 << 20), as: UTF8.self)
    }
    let status = process.terminationReason == .uncaughtSignal ? -process.terminationStatus : process.terminationStatus
    return Outcome(status: status, output: try text("out"), errors: try text("err"), seconds: seconds)
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

/// Owned by a scope rather than a test.
final class TemporaryFolderPath {
    let path: String

    init() throws {
        path = "\(NSTemporaryDirectory())/flotilla-it-\(UUID().uuidString.prefix(8))"
        try Files.createDirectories(path)
    }

    deinit { try? Files.remove(path) }
}
