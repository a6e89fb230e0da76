import FlotillaProtocol
import Glibc
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

    /// What properties of a task, or of the VM that a sweep asks for, are.
    private static func properties(_ type: String, _ values: [String: String]) -> FakeVCenter.Trouble {
        .answer("<returnval>\(objectXML(type, "x", values))</returnval>")
    }

    @Test func aRemovalThatLastsIsLeftToTheServer() throws {
        let server = try server { method, _, body in
            switch method {
            case "RemoveSnapshot_Task": return .answer("<returnval type=\"Task\">removal</returnval>")
            case "RetrievePropertiesEx" where body.contains(">removal<"):
                return Self.properties("Task", ["info": "<val><state>running</state></val>"])
            default: return nil
            }
        }
        let export = try export("?snapshot=1", from: server)
        let hurry = StopFlag()
        hurry.set()
        // A tenth of it.
        let left = try #require(export.end(isDone: true, within: .seconds(5), hurry: hurry))
        #expect("\(left)".contains("did not end it within 0.5 seconds"), "\(left)")
        #expect(server.calls("CancelTask") == 0)
        #expect(try leftExports(in: records).count == 1)
    }

    /// The request was sent, and its answer never came.
    private func lost(recent: String, tree: String = "") throws -> (FakeVCenter, MigrationError) {
        let server = try server { method, _, body in
            switch method {
            case "CreateSnapshot_Task": return .cut
            case "RetrievePropertiesEx" where body.contains("recentTask"):
                return Self.properties("VirtualMachine", ["recentTask": "<val>\(recent)</val>"])
            case "RetrievePropertiesEx" where body.contains("<pathSet>snapshot</pathSet></propSet>"):
                return Self.properties("VirtualMachine", ["snapshot": "<val>\(tree)</val>"])
            case "RetrievePropertiesEx" where body.contains(">making<"):
                let kind = "<descriptionId>VirtualMachine.createSnapshot</descriptionId>"
                return Self.properties("Task", ["info": "<val>\(kind)<state>running</state></val>"])
            default: return nil
            }
        }
        let error = try #require(throws: MigrationError.self) { try export("?snapshot=1", from: server) }
        return (server, error)
    }

    @Test func aSnapshotThatMayStillComeIsRemembered() throws {
        let (server, error) = try lost(recent: "")
        #expect(error.code == .unavailable)
        let record = try #require(try leftExports(in: records).first)
        #expect(sweepExports([record], servers: [server.server], stop: StopFlag()).isEmpty)
        #expect(Files.exists(record))
        // Nobody waits for ever.
        var times = [timespec(tv_sec: time(nil) - 3700, tv_nsec: 0), timespec(tv_sec: time(nil) - 3700, tv_nsec: 0)]
        #expect(utimensat(AT_FDCWD, record, &times, 0) == 0)
        #expect(sweepExports([record], servers: [server.server], stop: StopFlag()).isEmpty)
        #expect(!Files.exists(record))
    }

    @Test func aSnapshotThatIsBeingMadeIsWaitedFor() throws {
        let (server, _) = try lost(recent: "<ManagedObjectReference type=\"Task\">making</ManagedObjectReference>")
        let record = try #require(try leftExports(in: records).first)
        let failure = try #require(sweepExports([record], servers: [server.server], stop: StopFlag()).first)
        #expect("\(failure)".contains("still being made"), "\(failure)")
        #expect(Files.exists(record))
    }

    @Test func aSnapshotThatTheServerRefusedIsNone() throws {
        let server = try server { method, _, _ in
            method == "CreateSnapshot_Task" ? .fault("NoPermission", "<privilegeId>Snapshot</privilegeId>") : nil
        }
        #expect(throws: MigrationError.self) { try export("?snapshot=1", from: server) }
        #expect(try leftExports(in: records) == [])
    }

    /// Whether a change between capture and export is noticed.
    @Test(arguments: ["poweredOff", "poweredOn"]) func contentsOfAVMThatIsOffAreCompared(_ power: String) throws {
        var machine = MachineXML()
        machine.properties["runtime.powerState"] = "<val>\(power)</val>"
        let captured = try machine.captured("?snapshot=1")
        #expect(captured.source.fingerprint.count == 64)
        machine.diskDetail += "<contentId>c2</contentId>"
        let server = try FakeVCenter(places: machine.places, machines: [machine.xml])
        let client = try server.client()
        defer { client.close() }
        let source = try VSphereURL(parsing: "vsphere://me@\(server.authority)/?snapshot=1")
        func check(isOff: Bool) -> MigrationError? {
            failure { try requireUnchanged(client, source, captured, isOff: isOff, stop: StopFlag()) }
        }
        let isChanged = power == "poweredOff"
        #expect(check(isOff: false)?.message.contains("changed since it was captured") == (isChanged ? true : nil))
        // When it is started at its target, a snapshot of ours was on its disks meanwhile.
        #expect(check(isOff: true)?.message.contains("is running") == (isChanged ? nil : true))
    }

    @Test func anExportUnderWayIsNobodysToSweep() throws {
        let server = try server()
        let export = try export("?snapshot=1", from: server)
        #expect(try leftExports(in: records) == [])
        #expect(try leftExports(in: records, task: "t1").count == 1)
        #expect(export.end(isDone: true) == nil)
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
