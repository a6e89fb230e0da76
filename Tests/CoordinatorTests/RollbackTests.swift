import Coordinator
import FlotillaProtocol
import GRPCCore
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@Suite(.timeLimit(.minutes(1))) struct RollbackTests {
    @Test func whatIsDoneIsTakenBackAndDoneAgain() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            var deploy: TaskCall?
            for stage in Stage.way { deploy = try await worker.work(stage) }
            #expect(try await client.end(id).state == .done)

            let planned = try await client.rollbackMigration(.with { ($0.id, $0.dryRun) = (id, true) })
            #expect(planned.state == .done && planned.result.domainName == "web")

            let begun = try await client.rollbackMigration(.with { ($0.id, $0.force) = (id, true) })
            #expect(
                begun.state == .rollingBack && begun.stages.map(\.name) == ["export", "convert", "deploy", "undeploy"])
            // Asked for twice, done once.
            #expect(try await client.rollbackMigration(.with { $0.id = id }).state == .rollingBack)
            let undeploy = try await worker.work(.undeploy)
            let request = try UndeployRequest(serializedBytes: undeploy.body)
            #expect(request.migrationID == id && request.domainName == "web" && request.force)
            let first = try #require(deploy).identity.fence
            #expect(undeploy.identity.fence > first)
            let back = try await client.end(id)
            #expect(back.state == .rolledBack && !back.hasResult && back.manifest.disks.first?.hasTarget == true)
            #expect(back.findings.map(\.message) == ["0000:3b:00.0 was given back"])

            // Done again, by an attempt that counts for more than what took the last one back.
            #expect(try await client.submitMigration(Rig.request).id == id)
            for stage in Stage.way { deploy = try await worker.work(stage) }
            #expect(try #require(deploy).identity.fence > undeploy.identity.fence)
            let again = try await client.end(id)
            #expect(again.state == .done && again.stages.map(\.name) == ["export", "convert", "deploy"])
        }
    }

    @Test func failureSaysWhyAndCanBeTriedAgain() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            for stage in Stage.way { try await worker.work(stage) }
            _ = try await client.end(id)
            _ = try await client.rollbackMigration(.with { $0.id = id })
            let call = try await worker.take()
            try await worker.accept(call)
            try await worker.fail(call, .failedPrecondition, "domain web still runs")
            let failed = try await client.end(id)
            #expect(failed.state == .failed && failed.errorMessage == "domain web still runs")
            #expect(try await client.rollbackMigration(.with { $0.id = id }).errorMessage.isEmpty)
            try await worker.work(.undeploy)
            #expect(try await client.end(id).state == .rolledBack)
        }
    }

    @Test func whatMadeNoDomainOrStillRunsIsNotTakenBack() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            func refusal(_ id: String) async -> RPCError? {
                do {
                    _ = try await client.rollbackMigration(.with { $0.id = id })
                    return nil
                } catch { return error as? RPCError }
            }
            #expect(await refusal("nothing")?.code == .notFound)
            let id = try await client.submitMigration(Rig.request).id
            #expect(await refusal(id)?.message.contains("is still exporting") == true)
            let call = try await worker.take()
            try await worker.accept(call)
            try await worker.fail(call, .dataLoss, "the source is damaged")
            #expect(try await client.end(id).state == .failed)
            #expect(await refusal(id)?.message.contains("never defined a domain") == true)
        }
    }
}
