import FlotillaProtocol
import HostKit
import Logging
import Messaging
import MigrationModel
import Synchronization

/// Who belongs to the fleet: hosts that joined get their queues, those of which there is no key any more get nothing.
extension Coordinator {
    /// Throws `notFound` for a host of which nothing is known. In one process the worker tells of its host in a moment;
    /// that is waited for, and what earlier processes were told doesn't count.
    func requireHost(_ name: String) async throws {
        if !bus.isDurable, member.knows(name) { return await watchers.waitForHost(name) }
        guard try await store.write({ try $0.host(name) }) != nil else {
            throw MigrationError(
                .notFound, "no worker of a host \(name) has been heard of",
                hint: "flotilla host list shows those that have; a new one joins with flotilla host enroll")
        }
    }

    /// Gives hosts their queues that joined since the start, or whose queues are gone.
    func welcome(_ hosts: @Sendable () throws -> [String]) async throws {
        var known: Set<String> = []
        var declared = ContinuousClock.now
        while !Task.isCancelled {
            do {
                let present = Set(try hosts())
                try await noteForgotten()
                if present != known || declared + settings.queueInterval <= .now {
                    // Not tried, nor complained of, more often while the broker is away.
                    declared = .now
                    try await declare(present.sorted())
                }
                known = present
            } catch let error as MigrationError {
                logger.error("hosts not looked after", metadata: ["error": "\(error)"])
            }
            try await Task.sleep(for: settings.hostInterval)
        }
    }

    /// Says of which hosts there is no key any more, or one again, and tells those who watch their migrations.
    private func noteForgotten() async throws {
        let now = Set(try await store.write { try $0.hostNames() }).subtracting(try member.believed())
        let before = forgotten.withLock { forgotten in
            defer { forgotten = now }
            return forgotten
        }
        for host in now.subtracting(before).sorted() {
            logger.warning(
                "host has no key here: it gets no tasks, and isn't heard",
                metadata: ["host": "\(host)", "next": "flotilla host enroll, or stop its worker"])
        }
        for host in before.subtracting(now).sorted() { logger.info("host has a key", metadata: ["host": "\(host)"]) }
        let changed = now.symmetricDifference(before)
        if changed.isEmpty { return }
        try await decide { transitions in
            let open: [MigrationState] = [.exporting, .converting, .deploying, .rollingBack]
            for migration in try transitions.store.migrations(in: open) where changed.contains(migration.request.host) {
                try transitions.announce(migration.id)
            }
        }
    }

    /// One host's queue that the broker refuses, say because somebody else made it, is nobody else's trouble.
    func declare(_ hosts: [String]) async throws {
        do { return try await bus.declare(settings.names.topology(hosts: hosts)) } catch {
            try await bus.declare(settings.names.topology(hosts: []))
        }
        for host in hosts {
            do { try await bus.declare(settings.names.topology(hosts: [host])) } catch {
                logger.error("host has no queues", metadata: ["host": "\(host)", "error": "\(error)"])
            }
        }
    }
}
