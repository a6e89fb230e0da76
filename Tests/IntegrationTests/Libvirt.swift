import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// Everything that runs the real program against real services, one test after the other.
@Suite(.serialized, PrivateLibvirt()) struct Integration {}

/// One machine's worth of places for a migration: pool, state, sources.
final class Place {
    let folder: TemporaryFolder
    let pool: String
    let state: String
    let uri: String

    init(uri: String = PrivateLibvirt.uri) throws {
        folder = try TemporaryFolder()
        pool = try folder.sub("pool")
        state = "\(folder.path)/state"
        self.uri = uri
    }

    func migrate(
        _ sources: String..., options: [String] = [], failpoint: String? = nil, killAfter: Double? = nil,
        signal: Int32 = SIGKILL
    ) throws -> Outcome {
        let networks = [
            "--network", "VM Network=network:flotilla-a", "--network", "Storage Network=network:flotilla-b",
        ]
        return try run(
            Environment.flotilla(),
            ["migrate"] + sources + ["--host", uri, "--pool", pool, "--state", state] + networks + options,
            environment: failpoint.map { [Failpoint.environmentKey: $0] } ?? [:], killAfter: killAfter, signal: signal)
    }

    /// Names in the pool, hidden ones too.
    var poolFiles: [String] { get throws { try Files.list(pool) } }

    func virsh(_ arguments: String...) throws -> Outcome { try run("/usr/bin/virsh", ["-q", "-c", uri] + arguments) }

    var domains: [String] {
        get throws {
            try virsh("list", "--all", "--name").output.split(separator: "\n").map(String.init).filter { !$0.isEmpty }
        }
    }

    /// Removes the domains, so that the next test starts from none.
    func clear() throws {
        for name in try domains {
            _ = try virsh("destroy", name)
            _ = try virsh("undefine", name, "--nvram")
        }
    }

    /// The disks are valid images with the content of the guest's own raw disks.
    func expectDisks(_ domain: String, format: String = "qcow2", sourceLocation: SourceLocation = #_sourceLocation)
        throws
    {
        let guests = try Environment.guests()
        for number in 0..<2 {
            let image = "\(pool)/\(domain)-disk\(number).\(format)"
            if format == "qcow2" { try require("qemu-img", "check", "-q", image, sourceLocation: sourceLocation) }
            try require(
                "qemu-img", "compare", "-q", "-f", format, "-F", "raw", image,
                "\(guests)/raw/\(domain)-disk\(number + 1).raw", sourceLocation: sourceLocation)
        }
    }

    /// Nothing but the finished disks is left, and no result waits for anyone.
    func expectNoLeftovers(_ expected: [String], sourceLocation: SourceLocation = #_sourceLocation) throws {
        let found = try poolFiles
        #expect(found == expected.sorted(), sourceLocation: sourceLocation)
        let name = try #require(try Files.list(state).first { $0.hasSuffix(".journal") })
        let journal = String(decoding: try Files.read("\(state)/\(name)"), as: UTF8.self)
        let last = journal.split(separator: "\n").reduce(into: [String: Substring]()) { last, line in
            if let range = line.range(of: "\"task\":\"") {
                last[String(line[range.upperBound...].prefix { $0 != "\"" })] = line
            }
        }
        for line in last.values { #expect(line.contains("\"forgotten\":true"), sourceLocation: sourceLocation) }
    }
}

let webDisks = ["demo-web-disk0.qcow2", "demo-web-disk1.qcow2"]

extension MigrationEvent {
    var isProgress: Bool { if case .progress = event { true } else { false } }
}

/// The JSON objects of `--json`.
func events(_ outcome: Outcome) throws -> [MigrationEvent] {
    try outcome.output.split(separator: "\n").map { try MigrationEvent(jsonString: String($0)) }
}

func web() throws -> String { "ova:\(try Environment.guests())/demo-web.ova" }
func gpuVM() throws -> String { "vmx:\(try Environment.guests())/demo-gpu/demo-gpu.vmx" }
