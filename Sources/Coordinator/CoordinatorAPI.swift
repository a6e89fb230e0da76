package import FlotillaProtocol
package import GRPCCore
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf

/// The coordinator's gRPC API. Methods that this version does not have answer UNIMPLEMENTED by name.
package struct CoordinatorAPI: CoordinatorService.SimpleServiceProtocol {
    private let coordinator: Coordinator

    package init(_ coordinator: Coordinator) { self.coordinator = coordinator }

    package func submitMigration(
        request: SubmitMigrationRequest, context: ServerContext
    ) async throws -> Migration {
        try request.validate()
        try await coordinator.requireHost(request.host)
        try Task.checkCancellation()
        let migration = try await coordinator.decide { try $0.submit(request) }
        Failpoint.coordinatorMigrationStored.hit()
        return migration
    }

    package func submitMigrations(
        request: SubmitMigrationsRequest, context: ServerContext
    ) async throws -> SubmitMigrationsResponse {
        for migration in request.migrations {
            try migration.validate()
            try await coordinator.requireHost(migration.host)
        }
        try Task.checkCancellation()
        let ids = try await coordinator.decide { transitions in
            try request.migrations.map { try transitions.submit($0).id }
        }
        return .with { $0.migrationIds = ids }
    }

    package func getMigration(request: GetMigrationRequest, context: ServerContext) async throws -> Migration {
        let found = try await coordinator.store.write { [member = coordinator.member] store in
            try store.migration(id: request.id).map {
                Migration($0, tasks: try store.tasks(ofMigration: $0.id), knows: member.knows)
            }
        }
        guard let found else { throw MigrationError(.notFound, "there is no migration \(request.id)") }
        return coordinator.silences.told(found)
    }

    package func listMigrations(
        request: ListMigrationsRequest, context: ServerContext
    ) async throws -> ListMigrationsResponse {
        let limit = request.limit == 0 ? nil : Int(request.limit)
        let found = try await coordinator.store.write { [member = coordinator.member] store in
            try store.migrations(limit: limit).map {
                Migration($0, tasks: try store.tasks(ofMigration: $0.id), knows: member.knows)
            }
        }
        return .with { $0.migrations = found.map(coordinator.silences.told) }
    }

    package func watchMigration(
        request: WatchMigrationRequest, response: RPCWriter<MigrationEvent>, context: ServerContext
    ) async throws {
        // Watch first, then read the present state: no change falls between.
        let events = coordinator.watchers.watch(request.id)
        let present = try await getMigration(request: .with { $0.id = request.id }, context: context)
        try await response.write(
            .with {
                $0.migrationID = request.id
                $0.time = Moment.now.timestamp
                $0.state = present
            })
        if present.state.isFinal { return }
        for await event in events {
            try await response.write(event)
            if case .state(let migration) = event.event, migration.state.isFinal { return }
        }
    }

    package func cancelMigration(request: CancelMigrationRequest, context: ServerContext) async throws -> Migration {
        try await coordinator.decide { try $0.cancel(request.id) }
    }

    package func retryMigration(request: RetryMigrationRequest, context: ServerContext) async throws -> Migration {
        try await coordinator.decide { transitions in
            guard let record = try transitions.store.migration(id: request.id) else {
                throw MigrationError(.notFound, "there is no migration \(request.id)")
            }
            var again = record.request.withoutDeadline
            if request.hasDeadline { again.deadline = request.deadline }
            try again.validate()
            return try transitions.submit(again)
        }
    }

    package func listHosts(request: ListHostsRequest, context: ServerContext) async throws -> ListHostsResponse {
        let hosts = try await coordinator.store.write { try $0.hosts() }
        return .with { $0.hosts = hosts.map { Host($0, coordinator) } }
    }

    package func rollbackMigration(
        request: RollbackMigrationRequest, context: ServerContext
    ) async throws -> Migration { try await coordinator.decide { try $0.rollBack(request) } }

    package func drainHost(request: DrainHostRequest, context: ServerContext) async throws -> Host {
        try await coordinator.decide { [coordinator] transitions in
            try transitions.store.setDrained(!request.undrain, host: request.name)
            guard let host = try transitions.store.host(request.name) else {
                throw MigrationError(
                    .notFound, "no worker of a host \(request.name) has been heard of",
                    hint: "flotilla host list shows those that have")
            }
            return Host(host, coordinator)
        }
    }

    package func listQueues(request: ListQueuesRequest, context: ServerContext) async throws -> ListQueuesResponse {
        let queues = try await coordinator.queues()
        return .with { $0.queues = queues }
    }

    package func listDeadLetters(
        request: ListDeadLettersRequest, context: ServerContext
    ) async throws -> ListDeadLettersResponse {
        try await coordinator.deadLetters(limit: request.limit == 0 ? 100 : Int(request.limit))
    }

    package func replayDeadLetters(
        request: ReplayDeadLettersRequest, response: RPCWriter<ReplayDeadLettersResponse>, context: ServerContext
    ) async throws {
        try await coordinator.replayDeadLetters(request) { outcome in
            try await response.write(.with { $0.letters = [outcome] })
        }
    }

    package func applyPlan(request: ApplyPlanRequest, context: ServerContext) async throws -> ApplyPlanResponse {
        throw unimplemented("ApplyPlan")
    }

    package func listWaves(request: ListWavesRequest, context: ServerContext) async throws -> ListWavesResponse {
        throw unimplemented("ListWaves")
    }

    package func controlWave(request: ControlWaveRequest, context: ServerContext) async throws -> Wave {
        throw unimplemented("ControlWave")
    }

    private func unimplemented(_ method: String) -> MigrationError {
        MigrationError(.unimplemented, "CoordinatorService/\(method) is not in this version")
    }
}

extension Host {
    init(_ record: HostRecord, _ coordinator: Coordinator) {
        self.init()
        profile = record.profile
        if record.seenAt.milliseconds > 0 { seenAt = record.seenAt.timestamp }
        drained = record.isDrained
        tasks = UInt32(record.tasks)
        if let ahead = coordinator.clocks.ahead(record.profile.name) { clockAheadMs = ahead }
        forgotten = !coordinator.member.knows(record.profile.name)
    }
}
