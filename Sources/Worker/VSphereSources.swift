import Convert
import FlotillaProtocol
import HostKit
import MigrationModel
import Synchronization
package import VSphere

/// A vCenter or ESXi server that this worker may read from. Tasks name it by address and user; the rest stays here.
package struct VSphereSource: Sendable {
    package var server: VIMServer
    /// Bytes per second from each of its ESXi hosts and from each of its datastores.
    package var hostRate: UInt64?
    package var datastoreRate: UInt64?

    package init(_ server: VIMServer) { self.server = server }
}

/// The servers of a worker, and what limits their use.
package final class VSphereSources: Sendable {
    private let sources: [VSphereSource]
    private let limits: Limits

    package init(_ sources: [VSphereSource]) {
        self.sources = sources
        limits = Limits()
    }

    var servers: [VIMServer] { sources.map(\.server) }

    func source(of url: VSphereURL, host: String) throws -> VSphereSource {
        let found = sources.first { $0.server.authority == url.authority && $0.server.user == url.user }
        guard let found else {
            throw MigrationError(
                .permissionDenied, "host \(host) has no source vsphere://\(url.user)@\(url.authority)",
                hint: "add it to the worker's configuration under vsphere, with its password file")
        }
        return found
    }

    /// The ceilings for one disk.
    func limits(_ source: VSphereSource, _ manifest: Manifest, _ disk: Disk) -> [RateLimit] {
        let server = source.server.authority
        return [
            source.hostRate.map { limits.limit("host \(server) \(manifest.source.hostMoid)", $0) },
            source.datastoreRate.map { limits.limit("datastore \(server) \(disk.datastore)", $0) },
        ].compactMap { $0 }
    }

    /// At most this many disks at once from one ESXi host: more only slow each other down.
    static let transfersPerHost = 10

    func slots(_ source: VSphereSource, _ manifest: Manifest) -> TransferSlots {
        limits.slots("\(source.server.authority) \(manifest.source.hostMoid)")
    }
}

private final class Limits: Sendable {
    private let rates = Mutex<[String: RateLimit]>([:])
    private let hosts = Mutex<[String: TransferSlots]>([:])

    func limit(_ name: String, _ rate: UInt64) -> RateLimit {
        rates.withLock { rates in
            if let known = rates[name] { return known }
            let limit = RateLimit(bytesPerSecond: rate)
            rates[name] = limit
            return limit
        }
    }

    func slots(_ name: String) -> TransferSlots {
        hosts.withLock { hosts in
            if let known = hosts[name] { return known }
            let slots = TransferSlots(VSphereSources.transfersPerHost)
            hosts[name] = slots
            return slots
        }
    }
}

/// Lets a number of transfers run at once.
final class TransferSlots: Sendable {
    private let free: Mutex<Int>

    init(_ count: Int) { free = Mutex(count) }

    /// Blocks the calling thread until it is its turn, and runs `body`.
    ///
    /// - Parameter waiting: called while it isn't, at first and then twice a minute.
    func with<Value>(
        _ stop: StopFlag, waiting: () -> Void = {}, _ body: () throws -> Value
    ) throws -> Value {
        for turn in 0... {
            let isFree = free.withLock { free in
                guard free > 0 else { return false }
                free -= 1
                return true
            }
            if isFree { break }
            if turn.isMultiple(of: 150) { waiting() }
            try stop.wait(for: .milliseconds(200))
        }
        defer { free.withLock { $0 += 1 } }
        return try body()
    }
}
