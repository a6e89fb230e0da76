import Coordinator
import FlotillaProtocol
import GRPCCore
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// A deploy that does not come to its end leaves nothing on its host, even when no attempt of it is there to clean up.
@Suite(.timeLimit(.minutes(1))) struct TakeBackTests {
    /// How the deploy stands when it is cancelled.
    enum Standing: String, CaseIterable, Sendable {
        case failedAndWaiting, released, failedAndSentAgain, running
    }

    /// The deploy's first attempt, accepted and, unless it has yet to ask, permitted to define its domain.
    private func deploying(
        _ client: Rig.Client, _ worker: inout FakeWorker, isPermitted: Bool = true
    ) async throws -> (String, TaskCall) {
        let id = try await client.submitMigration(Rig.request).id
        for stage in [Stage.export, .convert] { try await worker.work(stage) }
        let call = try await worker.take()
        try await worker.accept(call)
        _ = try await worker.told {
            if case .lease = $0.kind { $0.fence == call.identity.fence ? true : nil } else { nil }
        }
        while try await client.getMigration(.with { $0.id = id }).stages.last?.state != "running" { await Task.yield() }
        if isPermitted { try await permit(call, &worker) }
        return (id, call)
    }

    private func permit(_ call: TaskCall, _ worker: inout FakeWorker) async throws {
        try await worker.say(call, .permit(.with { $0.step = "define-domain" }))
        let isGranted = try await worker.told { if case .permit(let reply) = $0.kind { reply.granted } else { nil } }
        #expect(isGranted)
    }

    /// Without a permit nothing is changed.
    @Test func whatNeverHadItsPermitNeedsNoTakingBack() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let (id, _) = try await deploying(client, &worker, isPermitted: false)
            #expect(try await client.cancelMigration(.with { $0.id = id }).state == .cancelled)
            #expect(try await client.end(id).stages.map(\.name) == ["export", "convert", "deploy"])
        }
    }

    /// Its result says what would be done.
    @Test func dryRunIsNoProofOfADeploy() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            var dry = Rig.request
            dry.dryRun = true
            let planned = try await client.submitMigration(dry).id
            try await worker.work(.export)
            try await worker.work(.deploy)
            #expect(try await client.end(planned).hasResult)
            let (id, _) = try await deploying(client, &worker)
            #expect(id == planned)
            // A dry run would make the real one stop.
            await #expect { _ = try await client.submitMigration(dry) } throws: {
                ($0 as? RPCError)?.code == .failedPrecondition
            }
            #expect(try await client.cancelMigration(.with { $0.id = id }).state == .rollingBack)
            try await worker.work(.undeploy)
            let ended = try await client.end(id)
            #expect(ended.state == .cancelled && !ended.hasResult)
        }
    }

    /// The undeploy made way for another run, which does not come as far.
    @Test func takingBackThatMadeWayIsMadeUpFor() async throws {
        let rig = try Rig(policy: .init(maximumFailures: 1))
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            try await worker.fail(call, .unavailable, "libvirt is away")
            let undeploy = try await worker.take()
            #expect(undeploy.identity.task.hasSuffix("undeploy"))
            var request = Rig.request
            request.options.gpu = .gpuRequire
            #expect(try await client.submitMigration(request).state == .exporting)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.fail(export, .notFound, "web.ova is gone")
            #expect(try await worker.work(.undeploy).identity.fence > undeploy.identity.fence)
            #expect(try await client.end(id).errorMessage == "web.ova is gone")
        }
    }

    @Test(arguments: Standing.allCases) func cancelTakesBackWhatAnAttemptLeft(_ standing: Standing) async throws {
        let rig = try Rig(policy: .init(backoff: .seconds(standing == .failedAndWaiting ? 3600 : 0)))
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            var last = call
            switch standing {
            case .running: break
            case .failedAndWaiting:
                try await worker.fail(call, .unavailable, "libvirt is away")
                while try await client.getMigration(.with { $0.id = id }).stages.last?.state != "waiting" {
                    await Task.yield()
                }
            case .released:
                try await worker.say(call, .released(TaskReleased()))
                last = try await worker.take()
            case .failedAndSentAgain:
                try await worker.fail(call, .unavailable, "libvirt is away")
                last = try await worker.take()
            }
            let cancelled = try await client.cancelMigration(.with { $0.id = id })
            #expect(cancelled.state == .rollingBack && cancelled.stages.last?.name == "undeploy")
            // An attempt that was on its way gets no permit any more, and one that came to its end is too late.
            try await worker.say(last, .permit(.with { $0.step = "define-domain" }))
            let reply = try await worker.told { if case .permit(let reply) = $0.kind { reply } else { nil } }
            #expect(!reply.granted)
            try await worker.succeed(last, DeployUpdate.with { $0.result.domainName = "web" })

            let undeploy = try await worker.work(.undeploy)
            let request = try UndeployRequest(serializedBytes: undeploy.body)
            #expect(request.domainName == "web" && request.force)
            #expect(undeploy.identity.fence > last.identity.fence)
            let ended = try await client.end(id)
            #expect(ended.state == .cancelled && !ended.hasResult)
            #expect(ended.findings.last?.message == "0000:3b:00.0 was given back")

            // The same request again is done, by an attempt that counts for more.
            #expect(try await client.submitMigration(Rig.request).id == id)
            for stage in Stage.way { last = try await worker.work(stage) }
            #expect(last.identity.fence > undeploy.identity.fence)
            #expect(try await client.end(id).state == .done)
        }
    }

    @Test func failuresForGoodAreTakenBackAndSayWhy() async throws {
        let rig = try Rig(policy: .init(maximumFailures: 2, backoff: .zero))
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            try await worker.fail(call, .unavailable, "libvirt is away")
            let again = try await worker.take()
            try await worker.accept(again)
            try await worker.fail(again, .unavailable, "libvirt is still away")
            try await worker.work(.undeploy)
            let ended = try await client.end(id)
            #expect(ended.state == .failed && ended.errorMessage == "libvirt is still away")
            #expect(ended.errorCode == Int32(MigrationError.Code.unavailable.rawValue))
        }
    }

    @Test func attemptsThatAreLostForGoodAreTakenBack() async throws {
        let rig = try Rig(policy: .init(maximumLosses: 1))
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            try await worker.say(call, .released(TaskReleased()))
            try await worker.work(.undeploy)
            let ended = try await client.end(id)
            #expect(ended.state == .failed && ended.errorMessage.contains("attempts at the deploy were lost"))
        }
    }

    /// Where the run ends that a deploy between two attempts made way for.
    enum Replacement: String, CaseIterable, Sendable {
        case blocked, notExported, cancelled
    }

    @Test(arguments: Replacement.allCases) func whatMadeWayIsTakenBackWhenItsRunEndsEarlier(
        _ replacement: Replacement
    ) async throws {
        let rig = try Rig(policy: .init(backoff: .seconds(3600)))
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            try await worker.fail(call, .unavailable, "libvirt is away")
            while try await client.getMigration(.with { $0.id = id }).stages.last?.state != "waiting" {
                await Task.yield()
            }
            var request = Rig.request
            request.options.gpu = .gpuRequire
            #expect(try await client.submitMigration(request).state == .exporting)
            switch replacement {
            case .blocked:
                try await worker.work(.export, manifest: Rig.manifestWithVgpu)
            case .notExported:
                let export = try await worker.take()
                try await worker.accept(export)
                try await worker.fail(export, .notFound, "web.ova is gone")
            case .cancelled:
                _ = try await worker.take()
                #expect(try await client.cancelMigration(.with { $0.id = id }).state == .rollingBack)
            }
            #expect(try await worker.work(.undeploy).identity.fence > call.identity.fence)
            let ended = try await client.end(id)
            switch replacement {
            case .blocked:
                #expect(ended.state == .preflightBlocked && ended.errorMessage.isEmpty)
                #expect(ended.findings.contains { $0.subject == "gpu0" && $0.severity == .blocked })
            case .notExported: #expect(ended.state == .failed && ended.errorMessage == "web.ova is gone")
            case .cancelled: #expect(ended.state == .cancelled)
            }
            // Once is enough.
            request.options.gpu = .gpuDrop
            _ = try await client.submitMigration(request)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.fail(export, .notFound, "web.ova is gone")
            let last = try await client.end(id)
            #expect(last.state == .failed && last.findings.isEmpty)
        }
    }

    /// A worker that ends a deploy has taken it back by itself.
    @Test func anEndThatTheWorkerSaidIsTheEnd() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let (id, call) = try await deploying(client, &worker)
            try await worker.fail(call, .failedPrecondition, "no proof; domain web was undefined again")
            let ended = try await client.end(id)
            #expect(ended.state == .failed && ended.stages.map(\.name) == ["export", "convert", "deploy"])
        }
    }

    /// Of a host that is gone for good nothing can be taken back: to cancel again ends the wait, and what is left is named.
    @Test func cancelledTwiceIsLeftAsItIs() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let (id, _) = try await deploying(client, &worker)
            #expect(try await client.cancelMigration(.with { $0.id = id }).state == .rollingBack)
            let ended = try await client.cancelMigration(.with { $0.id = id })
            #expect(ended.state == .cancelled)
            let finding = try #require(ended.findings.last)
            #expect(finding.message == "what the deploy left on kvm1 was not taken back")
            #expect(finding.remedy == "flotilla migration rollback \(id)")
        }
    }

    @Test func aFailureToTakeBackIsTold() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let (id, _) = try await deploying(client, &worker)
            _ = try await client.cancelMigration(.with { $0.id = id })
            let undeploy = try await worker.take()
            try await worker.accept(undeploy)
            try await worker.fail(undeploy, .failedPrecondition, "the vGPU is still there")
            let ended = try await client.end(id)
            #expect(ended.state == .cancelled)
            #expect(ended.findings.last?.message.hasSuffix("was not taken back: the vGPU is still there") == true)
            _ = try await client.rollbackMigration(.with { $0.id = id })
            try await worker.work(.undeploy)
            #expect(try await client.end(id).state == .rolledBack)
        }
    }

    /// What was never accepted left nothing; a domain that is in use stays when only its check is cancelled.
    @Test func nothingIsTakenBackThatWasNotMade() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            for stage in [Stage.export, .convert] { try await worker.work(stage) }
            let sent = try await worker.take()
            #expect(try await client.cancelMigration(.with { $0.id = id }).state == .cancelled)
            try await worker.say(sent, .permit(.with { $0.step = "define-domain" }))
            let reply = try await worker.told { if case .permit(let reply) = $0.kind { reply } else { nil } }
            #expect(!reply.granted)

            _ = try await client.submitMigration(Rig.request)
            for stage in Stage.way { try await worker.work(stage) }
            #expect(try await client.end(id).state == .done)
            worker.profile.domains = [.with { ($0.name, $0.migrationID) = ("web", id) }]
            try await worker.announce()
            try await client.hearOfDomains()
            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            let check = try await worker.take()
            #expect(try DeployRequest(serializedBytes: check.body).mode == .check)
            try await worker.accept(check)
            while try await client.getMigration(.with { $0.id = id }).stages.last?.state != "running" {
                await Task.yield()
            }
            let ended = try await client.cancelMigration(.with { $0.id = id })
            #expect(ended.state == .cancelled && ended.result.domainName == "web")
        }
    }
}
