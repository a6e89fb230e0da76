import Foundation
import Glibc
import HostKit
package import Testing

/// A private libvirtd with QEMU for a whole suite: own sockets, folders and network, stopped by pid afterwards. Needs root.
package struct PrivateLibvirt: SuiteTrait, TestScoping {
    @TaskLocal package static var uri = ""

    /// Around the whole suite, not around each test.
    package let isRecursive = false

    private static let (prefix, suffix) = ("qemu:///system?socket=", "/run/libvirt-sock")

    private static var script: String {
        // …/Tests/TestKit/PrivateLibvirt.swift
        let tests = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent().path
        return "\(tests)/testbeds/libvirt/run"
    }

    package init() {}

    private static var folder: String { String(uri.dropFirst(prefix.count).dropLast(suffix.count)) }

    /// Runs `body` while the suite's daemon takes connections and answers nothing.
    package static func paused<Value>(_ body: () async throws -> Value) async throws -> Value {
        let file = String(decoding: try Files.read("\(folder)/run/libvirtd.pid"), as: UTF8.self)
        let pid = try #require(pid_t(file.trimmingCharacters(in: .whitespacesAndNewlines)))
        try #require(kill(pid, SIGSTOP) == 0)
        defer { kill(pid, SIGCONT) }
        return try await body()
    }

    /// Ends the suite's daemon and starts it again, with the domains that are defined.
    package static func restart() throws {
        for action in ["stop", "start"] {
            let outcome = try Program.run(script, [action, "--dir", folder], limit: .seconds(120))
            try #require(outcome.status == 0, "libvirtd did not \(action): \(outcome.output)")
        }
    }

    package func provideScope(
        for test: Test, testCase: Test.Case?, performing function: @concurrent @Sendable () async throws -> Void
    ) async throws {
        let folder = "/tmp/flotilla-lv-\(getpid())-\(UUID().uuidString.prefix(4))"
        let script = Self.script
        let started = try Program.run(script, ["start", "--dir", folder], limit: .seconds(120))
        try #require(started.status == 0, "libvirtd did not start: \(started.output)")
        let stop = { try Program.run(script, ["stop", "--dir", folder]) }
        do {
            try await Self.$uri.withValue("\(Self.prefix)\(folder)\(Self.suffix)") { try await function() }
        } catch {
            _ = try? stop()
            throw error
        }
        let stopped = try stop()
        try #require(stopped.status == 0, "libvirtd did not stop: \(stopped.output)")
        try Files.remove(folder)
    }
}
