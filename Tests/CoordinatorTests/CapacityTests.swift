import Coordinator
import FlotillaProtocol
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// The host has one GPU: the second VM that wants it is told before a disk of it is converted.
@Suite(.timeLimit(.minutes(1))) struct CapacityTests {
    @Test func whatAMigrationUnderWayWillTakeIsTaken() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            worker.profile.iommuEnabled = true
            worker.profile.vfioAvailable = true
            worker.profile.pciFunctions = [
                .with {
                    ($0.address, $0.classCode, $0.driver, $0.iommuGroup) = ("0000:3b:00.0", 0x0302, "nvidia", 7)
                    $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) }
                }
            ]
            try await worker.announce()
            var manifest = Rig.manifest
            manifest.gpus = [
                .with {
                    ($0.id, $0.classCode) = ("gpu0", 0x0302)
                    $0.passthrough.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) }
                }
            ]
            var request = Rig.request
            request.options.gpu = .gpuRequire
            let first = try await client.submitMigration(request).id
            try await worker.work(.export, manifest: manifest)

            request.options.domainName = "second"
            let second = try await client.submitMigration(request).id
            // The first one's conversion waits in the queue before it.
            let converting = try await worker.take()
            #expect(converting.identity.task == Stage.convert.taskID(ofMigration: first))
            try await worker.work(.export, manifest: manifest)
            let blocked = try await client.end(second)
            #expect(blocked.state == .preflightBlocked)
            #expect(
                blocked.findings.contains { $0.message.contains("0000:3b:00.0") && $0.message.contains("goes first") },
                "\(blocked.findings.map(\.message))")
            #expect(blocked.stages.map(\.name) == ["export"])
        }
    }
}
