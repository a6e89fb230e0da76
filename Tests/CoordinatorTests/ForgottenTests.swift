import Coordinator
import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// A host whose keys were taken away.
@Suite(.timeLimit(.minutes(1))) struct ForgottenTests {
    private let rig: Rig
    private let key: String
    private let publicKey: PublicKey

    init() throws {
        var rig = try Rig()
        let (ours, theirs) = (SigningKey(), SigningKey())
        let trusted = "\(rig.folder.path)/trusted"
        key = "\(trusted)/\(Rig.host)/one.pem"
        publicKey = theirs.publicKey
        try Files.createDirectories("\(trusted)/\(Rig.host)")
        try Files.writeAtomically(publicKey.pem, to: key, mode: 0o644)
        rig.members = (
            FleetMember(name: FleetMember.coordinator, key: ours, believes: try KeyRing(folder: trusted)),
            FleetMember(name: Rig.host, key: theirs, believes: KeyRing([FleetMember.coordinator: [ours.publicKey]]))
        )
        rig.hostInterval = .milliseconds(20)
        self.rig = rig
    }

    private func isForgotten(_ client: Rig.Client) async throws -> Bool {
        try await client.listHosts(ListHostsRequest()).hosts.first?.forgotten == true
    }

    private func refusal(_ body: () async throws -> some Any) async throws -> RPCError? {
        do {
            _ = try await body()
            return nil
        } catch let error as RPCError { return error }
    }

    @Test func itGetsNoTasksAndItsMigrationSaysSo() async throws {
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            let convert = try await worker.take()
            try await worker.accept(convert)
            #expect(try await !isForgotten(client))
            try Files.remove(key)
            #expect(try await eventually { try await isForgotten(client) ? true : nil } == true)

            let refused = try await refusal { try await client.submitMigration(Rig.request) }
            #expect(refused?.code == .failedPrecondition && refused?.message.contains("host kvm1") == true)
            let said = try await client.getMigration(.with { $0.id = migration.id }).findings
            #expect(said.last?.message.contains("no key of host kvm1") == true)
            #expect(said.last?.remedy.contains("flotilla host enroll") == true)
            #expect(said.last?.remedy.contains("flotilla migration cancel \(migration.id)") == true)

            try Files.writeAtomically(publicKey.pem, to: key, mode: 0o644)
            #expect(try await eventually { try await isForgotten(client) ? nil : true } == true)
            var disks = try ConvertRequest(serializedBytes: convert.body).manifest.disks
            for index in disks.indices { disks[index].target.path = "/pool/web-disk\(index).qcow2" }
            try await worker.succeed(convert, ConvertUpdate.with { [disks] in $0.result.disks = disks })
            try await worker.work(.deploy)
            let ended = try await client.end(migration.id)
            #expect(ended.state == .done && !ended.findings.contains { $0.subject == Finding.enrollment })
        }
    }

    /// Of one that waits for its next attempt none is sent before the host has a key again.
    @Test func whatWaitsIsSentOnceItHasAKeyAgain() async throws {
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.fail(export, .unavailable, "again")
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            try Files.remove(key)
            #expect(try await eventually { try await isForgotten(client) ? true : nil } == true)
            try await Task.sleep(for: .milliseconds(1200))
            #expect(try await client.attempt(of: migration.id) == 1)
            try Files.writeAtomically(publicKey.pem, to: key, mode: 0o644)
            try await worker.work(.export)
            #expect(try await client.attempt(of: migration.id) == 2)
        }
    }
}
