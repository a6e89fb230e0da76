import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import Synchronization

/// Hands a migration's events to whoever watches it, in order. Who does not keep up with them misses the oldest, never
/// the migration's end.
final class Watchers: Sendable {
    private struct State {
        var next = 0
        var migrations: [String: [Int: AsyncStream<MigrationEvent>.Continuation]] = [:]
        var hosts: Set<String> = []
        var waitingForHost: [(name: String, continuation: AsyncStream<Void>.Continuation)] = []
    }

    /// Events that wait for one watcher, at most. One that has stopped must not make this process grow.
    static let buffered = 256

    private let state = Mutex(State())

    func hasWatcher(of id: String) -> Bool { state.withLock { $0.migrations[id] != nil } }

    func watch(_ id: String) -> AsyncStream<MigrationEvent> {
        let (stream, continuation) = AsyncStream<MigrationEvent>.makeStream(
            bufferingPolicy: .bufferingNewest(Self.buffered))
        let number = state.withLock {
            $0.next += 1
            $0.migrations[id, default: [:]][$0.next] = continuation
            return $0.next
        }
        continuation.onTermination = { [weak self] _ in
            self?.state.withLock {
                $0.migrations[id]?[number] = nil
                if $0.migrations[id]?.isEmpty ?? false { $0.migrations[id] = nil }
            }
        }
        return stream
    }

    func publish(_ event: MigrationEvent) {
        for watcher in state.withLock({ $0.migrations[event.migrationID].map { Array($0.values) } ?? [] }) {
            watcher.yield(event)
            // It is what a watch ends with; what a later run has to say must not take its place.
            if case .state(let migration) = event.event, migration.state.isFinal { watcher.finish() }
        }
    }

    func publish(_ migration: Migration) {
        publish(
            .with {
                $0.migrationID = migration.id
                $0.time = Moment.now.timestamp
                $0.state = migration
            })
    }

    func publish(host: String) {
        let ready = state.withLock { state in
            state.hosts.insert(host)
            let ready = state.waitingForHost.filter { $0.name == host }
            state.waitingForHost.removeAll { $0.name == host }
            return ready
        }
        for waiting in ready { waiting.continuation.finish() }
    }

    /// Returns once the host has told of itself in this process's lifetime, or the task is cancelled.
    func waitForHost(_ name: String) async {
        let (ready, continuation) = AsyncStream<Void>.makeStream()
        let known = state.withLock {
            if !$0.hosts.contains(name) { $0.waitingForHost.append((name, continuation)) }
            return $0.hosts.contains(name)
        }
        if known { return }
        for await _ in ready {}
    }
}
