import Coordinator
import FlotillaProtocol
import GRPCCore
import MigrationModel
import Messaging
import SwiftProtobuf

/// Submits migrations and shows them until all have ended. Returns them as they ended, in the order of the requests.
func follow(
    _ requests: [SubmitMigrationRequest], _ client: some CoordinatorService.ClientProtocol, _ view: any MigrationView
) async throws -> [Migration] {
    try await withThrowingTaskGroup(of: (Int, Migration).self) { group in
        for (index, request) in requests.enumerated() {
            group.addTask {
                do {
                    let submitted = try await client.submitMigration(request)
                    return (index, try await watch(submitted, client, view))
                } catch let error as RPCError {
                    throw MigrationError(error)
                }
            }
        }
        var ended: [Int: Migration] = [:]
        for try await (index, migration) in group { ended[index] = migration }
        return requests.indices.compactMap { ended[$0] }
    }
}

/// Shows one migration until it has ended.
func watch(
    _ migration: Migration, _ client: some CoordinatorService.ClientProtocol, _ view: any MigrationView
) async throws -> Migration {
    try await client.watchMigration(.with { $0.id = migration.id }) { response in
        var last = migration
        for try await event in response.messages {
            view.show(event)
            if case .state(let state) = event.event { last = state }
        }
        guard last.state.isFinal else {
            throw MigrationError(
                .cancelled, "\(last.title) was left unfinished", hint: "run the same command again")
        }
        return last
    }
}
