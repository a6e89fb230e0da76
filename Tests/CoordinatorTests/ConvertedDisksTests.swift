import Coordinator
import FlotillaProtocol
import GRPCCore
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// What a later run of a migration makes of images that an earlier one converted.
@Suite struct ConvertedDisksTests {
    private static let left = Finding.with {
        ($0.severity, $0.subject, $0.message) = (.warning, "source", "a snapshot is left")
    }

    /// The images were there before the worker heard of the cancel.
    @Test func convertThatEndsWellAfterItsCancelIsOfUse() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            try await worker.work(.export)
            let convert = try await worker.take()
            try await worker.accept(convert)
            _ = try await client.cancelMigration(.with { $0.id = id })
            let isCancel = { (control: ControlMessage) -> Bool? in if case .cancel = control.kind { true } else { nil }
            }
            _ = try await worker.told(isCancel)
            var disks = try ConvertRequest(serializedBytes: convert.body).manifest.disks
            disks[0].target.path = "/pool/web-disk0.qcow2"
            let result = ConvertResult.with { [disks] in ($0.disks, $0.findings) = (disks, [Self.left]) }
            try await worker.succeed(convert, ConvertUpdate.with { $0.result = result })
            _ = try await worker.told { if case .stored = $0.kind { true } else { nil } }
            let cancelled = try await client.end(id)
            #expect(cancelled.state == .cancelled && cancelled.findings.contains(Self.left))

            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            let again = try ConvertRequest(serializedBytes: try await worker.work(.convert).body)
            #expect(again.manifest.disks.map(\.target.path) == ["/pool/web-disk0.qcow2"])
            #expect(again.convertedFingerprint == "f1")
            try await worker.work(.deploy)
            #expect(try await client.end(id).state == .done)
        }
    }

    /// The person who looks at the end has not followed the way.
    @Test func whatAConvertLeftOnTheSourceIsToldAtTheEnd() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            try await worker.work(.export)
            let convert = try await worker.take()
            try await worker.accept(convert)
            let disks = try ConvertRequest(serializedBytes: convert.body).manifest.disks
            let result = ConvertResult.with { ($0.disks, $0.findings) = (disks, [Self.left]) }
            try await worker.succeed(convert, ConvertUpdate.with { $0.result = result })
            try await worker.work(.deploy)
            let done = try await client.end(id)
            #expect(done.state == .done && done.findings.contains(Self.left))
        }
    }

    /// Its checkpoints are kept for another attempt; nothing but a cancel frees their space.
    @Test(.timeLimit(.minutes(1)), arguments: [false, true])
    func cancelFreesWhatAFailedConvertLeft(_ isExporting: Bool) async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            try await worker.work(.export)
            let convert = try await worker.take()
            try await worker.accept(convert)
            try await worker.fail(convert, .resourceExhausted, "the pool is full")
            #expect(try await client.end(id).state == .failed)
            if isExporting {
                _ = try await client.submitMigration(Rig.request)
                try await worker.accept(try await worker.take())
            }
            let cancelled = try await client.cancelMigration(.with { $0.id = id })
            #expect(cancelled.state == (isExporting ? .cancelled : .failed))
            #expect(cancelled.stages.first { $0.name == "convert" }?.state == "cancelled")
            if !isExporting { #expect(cancelled.errorMessage == "the pool is full") }
            let isOfTheConvert = { (control: ControlMessage) -> Bool? in
                guard control.taskID == convert.identity.task, case .cancel(let cancel) = control.kind else {
                    return nil
                }
                #expect(control.fence == convert.identity.fence && !cancel.revoked)
                return true
            }
            _ = try await worker.told(isOfTheConvert)
            // Said again to a worker that lives, until it has done it.
            try await worker.heartbeat()
            _ = try await worker.told(isOfTheConvert)
            try await worker.fail(convert, .cancelled, "the migration was cancelled")

            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export)
            let again = try await worker.work(.convert)
            #expect(again.identity.fence > convert.identity.fence)
            try await worker.work(.deploy)
            #expect(try await client.end(id).state == .done)
        }
    }

    /// A domain whose name an earlier version made keeps it.
    @Test func aDomainThatHasANameKeepsIt() async throws {
        let rig = try Rig()
        var manifest = Rig.manifest
        manifest.vm.name = "Büro 1"
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            try await worker.work(.export, manifest: manifest)
            let first = try ConvertRequest(serializedBytes: try await worker.work(.convert).body)
            #expect(first.domainName.hasPrefix("B-ro-1-"))
            try await worker.work(.deploy)
            _ = try await client.end(id)
            var earlier = first
            earlier.domainName = "B-ro-1"
            let bytes: [UInt8] = try earlier.serializedBytes()
            try await SQLiteStore(path: "\(rig.folder.path)/store.sqlite").write { store in
                var task = try #require(try store.task(id: Stage.convert.taskID(ofMigration: id)))
                task.request = bytes
                try store.save(task)
            }
            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export, manifest: manifest)
            let convert = try ConvertRequest(serializedBytes: try await worker.work(.convert).body)
            #expect(convert.domainName == "B-ro-1")
            let deploy = try DeployRequest(serializedBytes: try await worker.work(.deploy).body)
            #expect(deploy.options.domainName == "B-ro-1")
        }
    }

    /// A capture of the changed source, for a dry run or before a refusal, does not make the images of the old one its own.
    @Test(arguments: [true, false]) func imagesBelongToTheSourceTheyWereMadeFrom(_ isDryRun: Bool) async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let id = try await client.submitMigration(Rig.request).id
            try await worker.work(.export)
            try await worker.work(.convert)
            let deploy = try await worker.take()
            try await worker.accept(deploy)
            try await worker.fail(deploy, .failedPrecondition, "no")
            #expect(try await client.end(id).state == .failed)

            var changed = Rig.manifest
            changed.source.fingerprint = "f2"
            var request = Rig.request
            if isDryRun {
                request.dryRun = true
            } else {
                changed.nics[0].network = "elsewhere"
            }
            _ = try await client.submitMigration(request)
            try await worker.work(.export, manifest: changed)
            if isDryRun { try await worker.work(.deploy) }
            #expect(try await client.end(id).state == (isDryRun ? .ready : .preflightBlocked))

            changed.nics = Rig.manifest.nics
            _ = try await client.submitMigration(Rig.request)
            try await worker.work(.export, manifest: changed)
            // The worker refuses images of another fingerprint than the request's.
            let convert = try ConvertRequest(serializedBytes: try await worker.take().body)
            #expect(convert.manifest.source.fingerprint == "f2")
            #expect(convert.convertedFingerprint == "f1")
        }
    }
}
