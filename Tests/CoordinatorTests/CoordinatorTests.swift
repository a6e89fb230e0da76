import Coordinator
import FlotillaProtocol
import GRPCCore
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@Suite(.timeLimit(.minutes(1))) struct CoordinatorTests {
    @Test func migrationGoesThroughItsStages() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            #expect(migration.state == .exporting)
            let export = try await worker.work(.export)
            #expect(try ExportRequest(serializedBytes: export.body).sourceURL == Rig.request.sourceURL)
            let convert = try await worker.work(.convert)
            let request = try ConvertRequest(serializedBytes: convert.body)
            #expect(request.pool == "fast" && request.format == "qcow2" && request.domainName == "web")
            #expect(request.manifest.migrationID == migration.id)
            let deploy = try DeployRequest(serializedBytes: try await worker.work(.deploy).body)
            #expect(deploy.manifest.disks.map(\.target.path) == ["/pool/web-disk0.qcow2"])
            let ended = try await client.end(migration.id)
            #expect(ended.state == .done)
            #expect(ended.result.domainState == "running")
            #expect(ended.stages.map(\.state) == ["succeeded", "succeeded", "succeeded"])
        }
    }

    @Test func preflightStopsBeforeAnythingIsConverted() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            var request = Rig.request
            request.options.gpu = .gpuRequire
            let migration = try await client.submitMigration(request)
            try await worker.work(.export, manifest: Rig.manifestWithVgpu)
            let ended = try await client.end(migration.id)
            #expect(ended.state == .preflightBlocked)
            #expect(ended.findings.contains { $0.subject == "gpu0" && $0.severity == .blocked })
            #expect(ended.stages.map(\.name) == ["export"])

            // The same VM without its GPU: the same migration goes on.
            request.options.gpu = .gpuDrop
            #expect(try await client.submitMigration(request).id == migration.id)
            try await worker.work(.export, manifest: Rig.manifestWithVgpu)
            try await worker.work(.convert)
            try await worker.work(.deploy)
            let done = try await client.end(migration.id)
            #expect(done.state == .done)
            #expect(done.findings.contains { $0.subject == "gpu0" && $0.severity == .warning })
        }
    }

    @Test(arguments: Stage.way)
    func restartTakesTheTaskBackUnderALargerFence(_ stage: Stage) async throws {
        let rig = try Rig()
        var id = ""
        var lost: TaskCall?
        try await rig.process { client, worker in
            id = try await client.submitMigration(Rig.request).id
            for earlier in Stage.way.prefix(while: { $0 != stage }) { try await worker.work(earlier) }
            let call = try await worker.take()
            try await worker.accept(call)
            _ = try await worker.told { if case .lease = $0.kind { true } else { nil } }
            lost = call
        }
        try await rig.process { client, worker in
            let first = try #require(lost)
            #expect(try await client.submitMigration(Rig.request).id == id)
            let again = try await worker.take()
            #expect(again.identity.task == first.identity.task)
            #expect(again.identity.fence == first.identity.fence + 1)
            #expect(again.body == first.body)
            try await worker.accept(again)
            // What the dead process's worker says now changes nothing.
            try await worker.fail(first, .dataLoss, "stale")
            #expect(try await client.getMigration(.with { $0.id = id }).state != .failed)
            try await worker.fail(again, .dataLoss, "this one counts")
            let ended = try await client.end(id)
            #expect(ended.state == .failed)
            #expect(ended.errorMessage == "this one counts")
        }
    }

    @Test func successOfALostProcessAnswersTheNextAttempt() async throws {
        let rig = try Rig()
        var first: TaskCall?
        try await rig.process { client, worker in
            _ = try await client.submitMigration(Rig.request)
            let call = try await worker.take()
            try await worker.accept(call)
            first = call
        }
        try await rig.process { client, worker in
            let first = try #require(first)
            let again = try await worker.take()
            // The worker must keep this result: the attempt that owns the task now has not brought it.
            try await worker.succeed(first, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            try await worker.accept(again)
            try await worker.succeed(again, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            let stored = try await worker.told { control -> UInt64? in
                if case .stored = control.kind { control.fence } else { nil }
            }
            #expect(stored == again.identity.fence)
        }
    }

    @Test func expiredLeaseRevokesAndIssuesAgain() async throws {
        let rig = try Rig(policy: .init(leaseDuration: .milliseconds(100)))
        try await rig.process { client, worker in
            _ = try await client.submitMigration(Rig.request)
            let first = try await worker.take()
            try await worker.accept(first)
            let second = try await worker.take()
            #expect(second.identity.fence == first.identity.fence + 1)
            let revoked = try await worker.told { control in
                if case .cancel(let cancel) = control.kind, cancel.revoked { control.fence } else { nil }
            }
            #expect(revoked == first.identity.fence)
        }
    }

    @Test func retryableFailureIsTriedAgainWithBackoffThenFails() async throws {
        let rig = try Rig(policy: .init(maximumFailures: 2, backoff: .milliseconds(20)))
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            for fence in 1...2 {
                let call = try await worker.take()
                #expect(call.identity.fence == UInt64(fence))
                try await worker.accept(call)
                try await worker.fail(call, .unavailable, "libvirt is restarting")
            }
            let ended = try await client.end(migration.id)
            #expect(ended.state == .failed)
            #expect(ended.stages.first?.attempt == 2)
        }
    }

    /// What ends its worker whenever it runs ends in a failure that says so, and can be asked for again.
    @Test func taskThatIsLostWithItsWorkerEveryTimeFails() async throws {
        let rig = try Rig(policy: .init(backoff: .milliseconds(20), maximumLosses: 3))
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            for fence in 1...3 as ClosedRange<UInt64> {
                let call = try await worker.take()
                #expect(call.identity.fence == fence)
                try await worker.accept(call)
                try await worker.say(call, .released(TaskReleased()))
            }
            let ended = try await client.end(migration.id)
            #expect(ended.state == .failed && ended.stages.map(\.attempt) == [3])
            #expect(ended.errorMessage.contains("3 attempts at the export") && ended.errorHint.contains(migration.id))
            _ = try await client.retryMigration(.with { $0.id = migration.id })
            #expect(try await worker.take().identity.fence == 4)
        }
    }

    @Test func permitIsGrantedToTheOwnerAlone() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            _ = try await client.submitMigration(Rig.request)
            var call = try await worker.take()
            try await worker.accept(call)
            func ask(_ call: TaskCall) async throws -> PermitReply {
                try await worker.say(call, .permit(.with { $0.step = "define-domain" }))
                return try await worker.told { if case .permit(let reply) = $0.kind { reply } else { nil } }
            }
            #expect(try await ask(call).granted)
            #expect(try await ask(call).granted)
            call.identity.fence += 1
            let refused = try await ask(call)
            #expect(!refused.granted && refused.reason.contains("fence 1"))
        }
    }

    @Test func endSaidTwiceMovesTheMigrationOnce() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.work(.export)
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            let convert = try await worker.take()
            #expect(convert.identity.fence == 1)
            try await worker.accept(convert)
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            _ = try await worker.told { $0.taskID == export.identity.task ? true : nil }
            #expect(try await client.getMigration(.with { $0.id = migration.id }).stages.last?.attempt == 1)
        }
    }

    @Test func doneMigrationIsCheckedAgainNotRepeated() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            for stage in Stage.way { try await worker.work(stage) }
            #expect(try await client.end(migration.id).state == .done)

            worker.profile.domains = [
                .with {
                    $0.name = "web"
                    $0.migrationID = migration.id
                }
            ]
            try await worker.announce()
            #expect(try await client.submitMigration(Rig.request).id == migration.id)
            try await worker.work(.export)
            #expect(try DeployRequest(serializedBytes: try await worker.work(.deploy).body).mode == .check)
            #expect(try await client.end(migration.id).state == .done)

            // Other options are not applied to what is in use, and that is said.
            var other = Rig.request
            other.options.start = true
            _ = try await client.submitMigration(other)
            try await worker.work(.export)
            #expect(try DeployRequest(serializedBytes: try await worker.work(.deploy).body).mode == .check)
            #expect(try await client.end(migration.id).findings.contains { $0.message.contains("other options") })

            // A changed source must not pass for done.
            _ = try await client.submitMigration(Rig.request)
            var changed = Rig.manifest
            changed.source.fingerprint = "f2"
            try await worker.work(.export, manifest: changed)
            let ended = try await client.end(migration.id)
            #expect(ended.state == .failed)
            #expect(ended.errorMessage.contains("changed"))
        }
    }

    /// What the guest showed is a proof too, and a check does not ask it again.
    @Test func checkKeepsWhatTheGuestShowed() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            for stage in [Stage.export, .convert] { try await worker.work(stage) }
            let deploy = try await worker.take()
            try await worker.accept(deploy)
            try await worker.succeed(
                deploy,
                DeployUpdate.with {
                    $0.result.domainUuid = "u1"
                    $0.result.domainState = "running"
                    $0.result.guestDevices = ["10de:20f1"]
                    $0.result.guestLicenseFiles = ["/etc/nvidia/gridd.conf"]
                    $0.result.benchmark.figure = 99
                })
            var first = try await client.end(id)
            #expect(first.state == .done)

            worker.profile.domains = [.with { ($0.name, $0.migrationID) = ("web", id) }]
            try await worker.announce()
            try await client.hearOfDomains()
            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            let check = try await worker.take()
            #expect(try DeployRequest(serializedBytes: check.body).mode == .check)
            try await worker.accept(check)
            try await worker.succeed(
                check, DeployUpdate.with { ($0.result.domainUuid, $0.result.domainState) = ("u1", "shut off") })
            let second = try await client.end(id)
            first.result.domainState = "shut off"
            #expect(second.state == .done && second.result == first.result)
        }
    }

    @Test func changedOptionsReplaceAnUnfinishedRequest() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            try await worker.work(.convert)
            let old = try await worker.take()
            try await worker.accept(old)
            var other = Rig.request
            other.options.start = true
            #expect(try await client.submitMigration(other).id == migration.id)
            let cancelled = try await worker.told { control -> UInt64? in
                if case .cancel = control.kind { control.fence } else { nil }
            }
            #expect(cancelled == old.identity.fence)
            try await worker.work(.export)
            try await worker.work(.convert)
            let deploy = try await worker.work(.deploy)
            #expect(deploy.identity.fence > old.identity.fence)
            #expect(try DeployRequest(serializedBytes: deploy.body).options.start)
            #expect(try await client.end(migration.id).state == .done)
        }
    }

    @Test func domainThatIsGoneIsDeployedAgain() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            for stage in Stage.way { try await worker.work(stage) }
            _ = try await client.end(migration.id)
            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            // The worker decides by what is on its disks whether they are kept.
            let convert = try ConvertRequest(serializedBytes: try await worker.work(.convert).body)
            #expect(convert.manifest.disks.map(\.target.path) == ["/pool/web-disk0.qcow2"])
            #expect(convert.convertedFingerprint == "f1")
            #expect(try DeployRequest(serializedBytes: try await worker.work(.deploy).body).mode == .deploy)
            #expect(try await client.end(migration.id).state == .done)
        }
    }

    @Test func onlySubmittedMigrationsStart() async throws {
        var rig = try Rig()
        rig.startsOnlySubmitted = true
        try await rig.process { client, worker in
            _ = try await client.submitMigration(Rig.request)
            try await worker.accept(try await worker.take())
        }
        try await rig.process { client, worker in
            var other = Rig.request
            other.sourceURL = "ova:/images/other.ova"
            let migration = try await client.submitMigration(other)
            let call = try await worker.take()
            #expect(call.identity.task == Stage.export.taskID(ofMigration: migration.id))
            try await worker.accept(call)
            _ = try await client.submitMigration(Rig.request)
            #expect(try await worker.take().identity.fence == 2)
        }
    }

    @Test func taskThatNoMessageHoldsFailsItsMigrationAlone() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            var request = Rig.request
            request.options.networks.append(
                .with {
                    $0.source = String(repeating: "n", count: 1000)
                    $0.bridge = "br0"
                })
            let migration = try await client.submitMigration(request)
            // Small enough for the export's event and the convert request, too large for the deploy request.
            var manifest = Rig.manifest
            manifest.vm.annotation = String(repeating: "x", count: Message.maximumBody - 700)
            try await worker.work(.export, manifest: manifest)
            try await worker.work(.convert)
            let ended = try await client.end(migration.id)
            #expect(ended.state == .failed)
            #expect(ended.errorMessage.contains("bytes"))

            var other = Rig.request
            other.sourceURL = "ova:/images/other.ova"
            let second = try await client.submitMigration(other)
            #expect(try await worker.take().identity.task == Stage.export.taskID(ofMigration: second.id))
        }
    }

    @Test func dryRunEndsReadyWithTheTargetsNamed() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            var request = Rig.request
            request.dryRun = true
            let migration = try await client.submitMigration(request)
            try await worker.work(.export)
            let deploy = try DeployRequest(serializedBytes: try await worker.work(.deploy).body)
            #expect(deploy.mode == .dryRun)
            #expect(deploy.manifest.disks.map(\.target.path) == ["/pool/web-disk0.qcow2"])
            #expect(try await client.end(migration.id).state == .ready)
        }
    }

    @Test func cancelReachesTheWorkerAndEndsTheMigration() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(Rig.request)
            let call = try await worker.take()
            try await worker.accept(call)
            _ = try await client.cancelMigration(.with { $0.id = migration.id })
            let cancel = try await worker.told { if case .cancel(let cancel) = $0.kind { cancel } else { nil } }
            #expect(!cancel.revoked)
            try await worker.fail(call, .cancelled, "stopped")
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            #expect(try await client.end(migration.id).state == .cancelled)
        }
    }

    @Test func whatIsNotThereYetAnswersUnimplemented() async throws {
        let rig = try Rig()
        try await rig.process { client, _ in
            let calls: [(String, () async throws -> Void)] = [
                ("ApplyPlan", { _ = try await client.applyPlan(ApplyPlanRequest()) }),
                ("ListWaves", { _ = try await client.listWaves(ListWavesRequest()) }),
                ("ControlWave", { _ = try await client.controlWave(ControlWaveRequest()) }),
            ]
            for (name, call) in calls {
                await #expect("\(name)") { try await call() } throws: {
                    let error = $0 as? RPCError
                    return error?.code == .unimplemented && error?.message.contains(name) ?? false
                }
            }
            await #expect { _ = try await client.getMigration(.with { $0.id = "nope" }) } throws: {
                ($0 as? RPCError)?.code == .notFound
            }
        }
    }
}
