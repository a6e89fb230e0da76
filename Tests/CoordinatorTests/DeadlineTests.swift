import Coordinator
import FlotillaProtocol
import GRPCCore
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// What becomes of a migration that must have ended by a certain time.
@Suite(.timeLimit(.minutes(1))) struct DeadlineTests {
    private func request(_ deadline: Moment) -> SubmitMigrationRequest {
        var request = Rig.request
        request.deadline = deadline.timestamp
        return request
    }

    private func expectLate(_ migration: Migration) {
        #expect(migration.state == .failed && migration.errorCode == MigrationError.Code.deadlineExceeded.rawValue)
        #expect(migration.errorMessage.contains("deadline") && migration.errorHint.contains("later deadline"))
    }

    @Test func taskThatWaitsForItsNextAttemptEndsInTime() async throws {
        let rig = try Rig(policy: .init(backoff: .seconds(3600)))
        try await rig.process { client, worker in
            let deadline = Moment.now + .milliseconds(300)
            let migration = try await client.submitMigration(request(deadline))
            let export = try await worker.take()
            #expect(export.deadline == deadline)
            try await worker.accept(export)
            try await worker.fail(export, .unavailable, "the source is away")
            expectLate(try await client.end(migration.id))
            #expect(Moment.now >= deadline)
            // Its files are kept, for whoever asks again.
            try await worker.heartbeat()
            let again = try await client.retryMigration(.with { $0.id = migration.id })
            #expect(again.state == .exporting)
            #expect(try await worker.take().deadline == nil)
        }
    }

    @Test func taskThatNobodyTakesOnEndsInTime() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let migration = try await client.submitMigration(request(.now + .milliseconds(300)))
            let export = try await worker.take()
            expectLate(try await client.end(migration.id))
            // Who takes it on all the same may not work on it.
            try await worker.accept(export)
            let revoked = try await worker.told { control -> UInt64? in
                if case .cancel(let cancel) = control.kind, cancel.revoked { control.fence } else { nil }
            }
            #expect(revoked == export.identity.fence)
        }
    }

    /// A handler that hangs has a worker whose heart beats.
    @Test func taskOfAWorkerThatOnlySaysItLivesEndsALeaseLater() async throws {
        let rig = try Rig(policy: .init(leaseDuration: .milliseconds(400)))
        try await rig.process { client, worker in
            let deadline = Moment.now + .milliseconds(900)
            let migration = try await client.submitMigration(request(deadline))
            try await worker.work(.export)
            try await worker.work(.convert)
            let deploy = try await worker.take()
            try await worker.accept(deploy)
            try await worker.say(deploy, .permit(.with { $0.step = "define-domain" }))
            while try await client.getMigration(.with { $0.id = migration.id }).state == .deploying {
                try await worker.say(deploy, .heartbeat(TaskHeartbeat()))
                try await Task.sleep(for: .milliseconds(20))
            }
            #expect(Moment.now >= deadline + .milliseconds(400))
            _ = try await worker.told { if case .cancel(let cancel) = $0.kind, cancel.revoked { true } else { nil } }
            // What it may have made is taken back, for which there is no deadline.
            let undeploy = try await worker.work(.undeploy)
            #expect(undeploy.deadline == nil && undeploy.identity.fence > deploy.identity.fence)
            expectLate(try await client.end(migration.id))
        }
    }

    @Test func whatIsUnderWayKeepsItsDeadline() async throws {
        let rig = try Rig()
        try await rig.process { client, worker in
            let first = Moment.now + .seconds(3600)
            let migration = try await client.submitMigration(request(first))
            let export = try await worker.take()
            try await worker.accept(export)
            let same = try await client.submitMigration(request(first + .seconds(3600)))
            #expect(same.id == migration.id && same.request.deadline.moment == first)
            try await worker.succeed(export, ExportUpdate.with { $0.result.manifest = Rig.manifest })
            let convert = try await worker.work(.convert)
            #expect(convert.identity.attempt == 1 && convert.deadline == first)
            try await worker.work(.deploy)
            #expect(try await client.end(migration.id).state == .done)
            // Done is done; it is looked at again, by the time of whoever asks now.
            let second = Moment.now + .seconds(60)
            _ = try await client.submitMigration(request(second))
            #expect(try await worker.take().deadline == second)
        }
    }

    @Test func passedDeadlineIsRefused() async throws {
        let rig = try Rig()
        try await rig.process { client, _ in
            await #expect { _ = try await client.submitMigration(request(.now)) } throws: {
                ($0 as? RPCError)?.code == .invalidArgument
            }
            let left = try await client.listMigrations(.init()).migrations
            #expect(left.isEmpty)
        }
    }

    /// The store would keep what no notification can say.
    @Test(arguments: [(Int64(1) << 40, Int32(0)), (253_402_300_799, 1_000_000_000), (253_402_300_799, -1)])
    func deadlineOutOfRangeIsRefused(_ seconds: Int64, _ nanos: Int32) async throws {
        let rig = try Rig()
        let deadline = Google_Protobuf_Timestamp.with { ($0.seconds, $0.nanos) = (seconds, nanos) }
        var request = Rig.request
        request.deadline = deadline
        try await rig.process { [request] client, worker in
            await #expect { _ = try await client.submitMigration(request) } throws: {
                ($0 as? RPCError)?.code == .invalidArgument
            }
            let migration = try await client.submitMigration(Rig.request)
            let export = try await worker.take()
            try await worker.accept(export)
            try await worker.fail(export, .invalidArgument, "there is no such source")
            _ = try await client.end(migration.id)
            await #expect {
                _ = try await client.retryMigration(.with { ($0.id, $0.deadline) = (migration.id, deadline) })
            } throws: { ($0 as? RPCError)?.code == .invalidArgument }
            #expect(try await client.getMigration(.with { $0.id = migration.id }).state == .failed)
        }
    }

    @Test func momentsOfOutsideStayWithinTheirBounds() {
        for (seconds, year) in [(Int64.max, "9999-12-31T23:59:59Z"), (.min, "0001-01-01T00:00:00Z")] {
            #expect(Google_Protobuf_Timestamp.with { $0.seconds = seconds }.moment.timestamp.text == year)
        }
    }
}
