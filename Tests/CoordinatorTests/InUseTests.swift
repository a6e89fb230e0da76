import Coordinator
import FlotillaProtocol
import GRPCCore
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// A domain that was done once is in use: no failure of anything later takes it back.
@Suite(.timeLimit(.minutes(1))) struct InUseTests {
    /// A migration that was done, then failed to be looked at again.
    private func doneThenFailed(_ client: Rig.Client, _ worker: inout FakeWorker) async throws -> String {
        let id = try await client.submitMigration(Rig.request).id
        for stage in [Stage.export, .convert] { try await worker.work(stage) }
        let deploy = try await worker.take()
        #expect(try !DeployRequest(serializedBytes: deploy.body).doneBefore)
        try await worker.accept(deploy)
        try await worker.say(deploy, .permit(.with { $0.step = "define-domain" }))
        #expect(try await worker.told { if case .permit(let reply) = $0.kind { reply.granted } else { nil } })
        try await worker.succeed(deploy, DeployUpdate.with { $0.result.domainName = "web" })
        #expect(try await client.end(id).state == .done)
        _ = try await client.submitMigration(Rig.request)
        try await failExport(&worker)
        #expect(try await client.end(id).result.domainName == "web")
        return id
    }

    private func failExport(_ worker: inout FakeWorker) async throws {
        let export = try await worker.take()
        #expect(export.identity.task.hasSuffix("export"))
        try await worker.accept(export)
        try await worker.fail(export, .notFound, "the source is gone")
    }

    @Test func aDryRunDoesNotMakeItForgotten() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await doneThenFailed(client, &worker)
            var dry = Rig.request
            dry.dryRun = true
            for request in [dry, dry, Rig.request] {
                _ = try await client.submitMigration(request)
                try await failExport(&worker)
                let ended = try await client.end(id)
                #expect(ended.state == .failed && ended.result.domainName == "web")
            }
            // A person may.
            _ = try await client.rollbackMigration(.with { $0.id = id })
            try await worker.work(.undeploy)
            #expect(try await client.end(id).state == .rolledBack)
        }
    }

    /// The host's inventory may be of a moment ago, or of another day by its clock.
    @Test func anInventoryThatKnowsNothingOfItIsNoReason() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await doneThenFailed(client, &worker)
            _ = try await client.submitMigration(Rig.request)
            for stage in [Stage.export, .convert] { try await worker.work(stage) }
            let deploy = try await worker.take()
            // Nor may the worker, when this one fails.
            #expect(try DeployRequest(serializedBytes: deploy.body).doneBefore)
            try await worker.accept(deploy)
            _ = try await client.cancelMigration(.with { $0.id = id })
            let ended = try await client.end(id)
            #expect(ended.state == .cancelled && ended.stages.map(\.name) == ["export", "convert", "deploy"])
            #expect(ended.findings.last?.remedy.hasSuffix("flotilla migration rollback \(id)") == true)
        }
    }

    /// The attempt that ends never came to where it could see what a lost one had made.
    @Test func whatALostAttemptMadeIsTakenBackAfterAnotherFailed() async throws {
        let rig = try Rig(policy: .init(backoff: .milliseconds(1)))
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            for stage in [Stage.export, .convert] { try await worker.work(stage) }
            let lost = try await worker.take()
            try await worker.accept(lost)
            try await worker.say(lost, .permit(.with { $0.step = "define-domain" }))
            #expect(try await worker.told { if case .permit(let reply) = $0.kind { reply.granted } else { nil } })
            try await worker.say(lost, .released(TaskReleased()))
            let next = try await worker.take()
            #expect(next.identity.fence > lost.identity.fence)
            try await worker.accept(next)
            try await worker.fail(next, .notFound, "pool fast is not mounted")
            try await worker.work(.undeploy)
            let ended = try await client.end(id)
            #expect(ended.state == .failed && ended.errorMessage == "pool fast is not mounted")
        }
    }

    /// Nobody must take a rollback's end for a migration's.
    @Test func whatIsBeingRolledBackIsNotMigrated() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await doneThenFailed(client, &worker)
            _ = try await client.rollbackMigration(.with { $0.id = id })
            var other = Rig.request
            other.options.start = true
            for request in [Rig.request, other] {
                await #expect { _ = try await client.submitMigration(request) } throws: {
                    let error = $0 as? RPCError
                    return error?.code == .failedPrecondition && error?.message.contains("rolled back") ?? false
                }
            }
            try await worker.work(.undeploy)
            #expect(try await client.end(id).state == .rolledBack)
        }
    }
}
