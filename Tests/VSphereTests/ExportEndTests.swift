import FlotillaProtocol
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import VSphere

/// What is said when an export could not tidy up.
@Suite struct ExportEndTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private var records: String { "\(folder.path)/exports" }

    private func export(_ query: String, from server: FakeVCenter) throws -> VMExport {
        let source = try VSphereURL(parsing: "vsphere://me@\(server.authority)/\(query)")
        let client = try server.client()
        defer { client.close() }
        var found: [Manifest] = []
        try Inventory(client, source, stop: StopFlag()).virtualMachines(stop: StopFlag()) { found.append($0) }
        return try VMExport(server.server, found[0], folder: records, task: "t1", stop: StopFlag())
    }

    private func server(
        _ trouble: @escaping @Sendable (String, Int, String) -> FakeVCenter.Trouble? = { _, _, _ in nil }
    ) throws -> FakeVCenter {
        try FakeVCenter(places: MachineXML().places, machines: [MachineXML().xml], trouble: trouble)
    }

    @Test(arguments: ["", "?snapshot=1"]) func nothingIsLeft(_ query: String) throws {
        let server = try server()
        #expect(try export(query, from: server).end(isDone: true) == nil)
        #expect(try leftExports(in: records) == [])
        #expect(server.calls("RemoveSnapshot_Task") == (query.isEmpty ? 0 : 1))
    }

    @Test func aSnapshotThatStaysIsNamed() throws {
        let server = try server { method, _, _ in
            method == "RemoveSnapshot_Task" ? .fault("NoPermission", "<privilegeId>Snapshot.Remove</privilegeId>") : nil
        }
        let left = try #require(export("?snapshot=1", from: server).end(isDone: true))
        #expect(
            left.message.contains("snapshot flotilla-t1.") && left.message.hasSuffix("of web is left on the source"))
        #expect("\(left)".contains("Snapshot.Remove"), "\(left)")
        // For the next attempt to find.
        #expect(try leftExports(in: records, task: "t1").count == 1)
    }

    @Test(arguments: ["", "flotilla-t1.x"]) func aRecordOfAnUnknownServerSaysWhatToLookFor(_ snapshot: String) throws {
        let record = folder.path + "/t1.x"
        let lines = ["flotilla export 1", "vc", "me", "vm-1", snapshot, "lease-1", ""]
        try Files.writeAtomically(Array(lines.joined(separator: "\n").utf8), to: record)
        let error = try #require(sweepExports([record], servers: [], stop: StopFlag()).first)
        #expect(error.message.contains("me@vc"))
        #expect(error.hint?.contains("snapshot") == !snapshot.isEmpty && error.hint?.contains(record) == true)
    }
}
