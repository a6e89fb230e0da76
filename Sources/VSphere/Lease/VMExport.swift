package import DiskImage
import Download
import Export
package import FlotillaProtocol
package import HostKit
package import MigrationModel
import Synchronization

/// The export of one captured VM: a session, perhaps a snapshot, a lease, and the disks' bytes. Blocking, but for the
/// thread that keeps the lease. `end` must be called, whatever happens.
package final class VMExport: Sendable {
    private struct State {
        var lease: NFCLease?
        var leases = 0
        var record: ExportRecord
        var snapshot: ObjectReference?
        var percent = 0
    }

    /// A server that loses this many leases is given up.
    private static let leaseLimit = 6
    /// A snapshot of a VM that writes a lot may take hours to be merged, which the server does without us.
    package static let removalLimit = Duration.seconds(600)

    private static let laterHint =
        "a worker removes it within minutes of when that works, 'flotilla migrate' when it runs again"

    private let client: VIMClient
    private let source: VSphereURL
    private let manifest: Manifest
    private let vm: ObjectReference
    private let state: Mutex<State>
    /// Held by the thread that asks for a lease.
    private let leaseTurn = Mutex(())

    /// Connects, compares the VM with its capture, and makes the snapshot if the source asks for one.
    ///
    /// - Parameters:
    ///   - folder: keeps the record of what must be taken away again.
    ///   - task: names the record; what an earlier attempt at it left is taken away first.
    /// - Throws: `failedPrecondition` when the VM changed since its capture, or runs and no snapshot was asked for.
    package init(
        _ server: VIMServer, _ manifest: Manifest, folder: String, task: String, stop: StopFlag
    ) throws {
        self.manifest = manifest
        source = try VSphereURL(parsing: manifest.source.url)
        vm = ObjectReference("VirtualMachine", manifest.source.vmMoid)
        let client = try VIMClient(server, stop: stop)
        self.client = client
        do {
            for path in try leftExports(in: folder, task: task) {
                try ExportRecord(path: path)?.sweep(client, stop: stop)
            }
            try VSphere.requireUnchanged(client, source, manifest, stop: stop)
            var record = try ExportRecord(folder: folder, task: task, server: server, vm: vm.value)
            var snapshot: ObjectReference?
            if source.snapshot {
                record.snapshot = "flotilla-\(Files.name(of: record.path))"
                do {
                    try record.save()
                    let made = try client.createSnapshot(
                        of: vm, named: record.snapshot,
                        description: "Made by flotilla for a migration; removed after it",
                        quiesce: manifest.vm.tools.status == "toolsOk" && manifest.vm.powerState == .poweredOn,
                        stop: stop)
                    if source.transfer == .datastore {
                        try record.requireCapturedFiles(of: made, manifest, client, stop: stop)
                    }
                    snapshot = made
                } catch {
                    // The task may have come further than we heard.
                    let isSettled = !stop.isSet && (error as? MigrationError).map { $0.code != .unavailable } ?? false
                    try? within(Self.removalLimit, hurry: stop) {
                        try record.sweep(client, isSettled: isSettled, stop: $0)
                    }
                    record.release()
                    throw error
                }
            }
            state = Mutex(State(record: record, snapshot: snapshot))
        } catch {
            client.close()
            throw error
        }
    }

    /// How far all disks together are, for the server.
    package func report(percent: Int) { state.withLock { $0.percent = percent } }

    /// The disk's bytes, front to back, from the beginning.
    package func stream(of disk: Disk, stop: StopFlag) throws -> sending any ByteSource {
        let device = try lease(stop).device(of: disk, among: manifest.disks)
        return LeaseSource(try HTTPSource(try location(of: device, disk), stop: stop))
    }

    /// The disk in ranges, while the lease keeps the VM as it is.
    package func ranges(of disk: Disk, stop: StopFlag) throws -> any DiskSource {
        _ = try lease(stop)
        guard let path = DatastorePath(disk.source.path), path.path.hasSuffix(".vmdk") else {
            throw MigrationError(.invalidArgument, "\(disk.id): '\(disk.source.path.printable)' is not in a datastore")
        }
        let file = String(path.path.dropLast(".vmdk".count)) + "-flat.vmdk"
        // A single ESXi host calls its only data centre so.
        let datacenter = manifest.source.datacenter.isEmpty ? "ha-datacenter" : manifest.source.datacenter
        let url =
            "/folder/\(VSphereURL.encoded(file, besides: "/"))?dcPath=\(VSphereURL.encoded(datacenter))"
            + "&dsName=\(VSphereURL.encoded(path.datastore))"
        let location = client.server.location(url, name: "[\(path.datastore)] \(file)", cookie: client.cookie)
        let flat: HTTPDisk
        do { flat = try HTTPDisk(location, stop: stop) } catch let error as MigrationError
            where error.code == .unimplemented
        {
            // A proxy may do that once.
            throw MigrationError(.unavailable, error.message, hint: "leave --via datastore out")
        }
        guard flat.capacity == disk.capacityBytes else {
            throw MigrationError(
                .failedPrecondition,
                "[\(path.datastore)] \(file) has \(flat.capacity) bytes, \(disk.id) \(disk.capacityBytes)",
                hint: "leave --via datastore out")
        }
        return flat
    }

    /// Throws `failedPrecondition` unless all that was read is of one moment. To be called when everything is read, before
    /// `end`: a lease may have been lost on the way, and the VM started since, or its snapshot removed.
    package func requireUnchanged(stop: StopFlag) throws {
        let (snapshot, record) = state.withLock { ($0.snapshot, $0.record) }
        if snapshot != nil { return try record.requireSnapshot(of: manifest, client, stop: stop) }
        try VSphere.requireUnchanged(client, source, manifest, stop: stop)
    }

    /// Ends the lease, removes the snapshot and closes the session. What takes too long is left to those who sweep: the
    /// disks that were read are as good as ever.
    ///
    /// - Parameters:
    ///   - limit: how long the removal is waited for.
    ///   - hurry: a tenth of that, once it is set.
    /// - Returns: what is left on the server and why; nil when nothing is.
    package func end(
        isDone: Bool, within limit: Duration = removalLimit, hurry: StopFlag = StopFlag()
    ) -> MigrationError? {
        let (lease, record, snapshot) = state.withLock { state in
            defer { state.lease = nil }
            return (state.lease, state.record, state.snapshot)
        }
        defer {
            record.release()
            client.close()
        }
        let name = manifest.vm.name.printable
        do {
            try within(limit, hurry: hurry) { stop in
                lease?.end(isDone: isDone, stop)
                if let snapshot { try remove(snapshot, stop) }
            }
        } catch {
            return MigrationError(
                .unavailable, "snapshot \(record.snapshot) of \(name) is left on the source",
                hint: Self.laterHint, cause: error)
        }
        do { try record.remove() } catch {
            return MigrationError(
                .unavailable, "the export of \(name) left nothing on the source, but its record here: \(record.path)",
                hint: Self.laterHint, cause: error)
        }
        return nil
    }

    private func remove(_ snapshot: ObjectReference, _ stop: StopFlag) throws {
        for attempt in 0... {
            do { return try client.removeSnapshot(snapshot, stop: stop) } catch let error as MigrationError {
                guard error.code == .unavailable, attempt < 3 else { throw error }
                try stop.wait(for: .seconds(1 << attempt))
            }
        }
    }

    private func lease(_ stop: StopFlag) throws -> NFCLease {
        try leaseTurn.withLock { _ in
            if let lease = state.withLock({ $0.lease }) {
                if try lease.isAlive(stop) { return lease }
                state.withLock { $0.lease = nil }
                lease.end(isDone: false)
            }
            let (leases, snapshot) = state.withLock { state in
                state.leases += 1
                return (state.leases, state.snapshot)
            }
            guard leases <= Self.leaseLimit else {
                throw MigrationError(
                    .deadlineExceeded,
                    "\(client.server.authority): lost \(Self.leaseLimit) export leases of "
                        + manifest.vm.name.printable, hint: "look at the server's own log for why, then try again")
            }
            let request =
                snapshot.map { VIMRequest("ExportSnapshot", on: $0, isRepeatable: false) }
                ?? VIMRequest("ExportVm", on: vm, isRepeatable: false)
            let subject = "VM \(manifest.vm.name.printable)"
            guard let reference = try client.call(request, subject, stop: stop).reference("returnval") else {
                throw MigrationError(.unavailable, "\(client.server.authority): no export lease for \(subject)")
            }
            do {
                try state.withLock { state in
                    state.record.lease = reference.value
                    try state.record.save()
                }
            } catch {
                // Nobody would end it.
                _ = try? client.answer(VIMRequest("HttpNfcLeaseAbort", on: reference), StopFlag())
                throw error
            }
            let lease = try NFCLease(client, reference, stop: stop) { [weak self] in
                self?.state.withLock { $0.percent } ?? 0
            }
            state.withLock { $0.lease = lease }
            return lease
        }
    }

    private func location(of device: NFCLease.DeviceURL, _ disk: Disk) throws -> HTTPLocation {
        let scheme = "\(client.server.scheme)://"
        let start = device.url.index(device.url.startIndex, offsetBy: scheme.count, limitedBy: device.url.endIndex)
        guard device.url.hasPrefix(scheme), let start, let slash = device.url[start...].firstIndex(of: "/") else {
            throw MigrationError(
                .failedPrecondition, "\(client.server.authority): \(disk.id) would come from '\(device.url.printable)'",
                hint: "only https addresses are used")
        }
        let named = device.url[start..<slash]
        // '*' stands for the server that was asked.
        let isOwn = named == "*" || named.hasPrefix("*:") || named.lowercased() == client.server.authority
        let digits = device.thumbprint.filter { $0 != ":" }.count
        let trust: ServerTrust =
            device.thumbprint.isEmpty
            ? client.server.trust
            : .fingerprint(try CertificateFingerprint(device.thumbprint, digits == 64 ? .sha256 : .sha1))
        let host = isOwn ? client.server.authority : String(named)
        var location = HTTPLocation(
            "\(client.server.scheme)://\(host)\(device.url[slash...])", name: "\(host): export of \(disk.id)",
            trust: trust, headers: isOwn ? client.cookie.map { ["Cookie: \($0)"] } ?? [] : [])
        location.trustHint = "the lease names another certificate than the host shows: look at the host's certificate"
        return location
    }
}

/// Runs work that can't be given up at once, with a flag that is set when it lasts longer than `limit`, or than a tenth of
/// that once `hurry` is set.
private func within(_ limit: Duration, hurry: StopFlag, _ body: (StopFlag) throws -> Void) rethrows {
    let over = StopFlag()
    defer { over.set() }
    let start = ContinuousClock.now
    spawnThread("export-end") {
        while !over.isSet {
            let longest = hurry.isSet ? limit / 10 : limit
            if ContinuousClock.now - start > longest {
                over.set(MigrationError(.deadlineExceeded, "the server did not end it within \(longest)"))
            }
            try? over.wait(for: min(limit / 20, .milliseconds(500)))
        }
    }
    try body(over)
}

/// An answer that isn't there means a lease that ended: worth a new one.
private final class LeaseSource: ByteSource {
    private let source: HTTPSource

    init(_ source: HTTPSource) { self.source = source }

    var name: String { source.name }
    var length: UInt64? { source.length }

    func read(into buffer: UnsafeMutableRawBufferPointer) throws -> Int {
        do { return try source.read(into: buffer) } catch let error as MigrationError where error.code == .notFound {
            throw MigrationError(.unavailable, error.message)
        }
    }
}

/// Throws `failedPrecondition` when the VM is no longer what was captured, or isn't in a state to be exported.
///
/// - Parameter isOff: whether it must not run, however its disks are read.
package func requireUnchanged(
    _ client: VIMClient, _ source: VSphereURL, _ manifest: Manifest, isOff: Bool = false, stop: StopFlag
) throws {
    let object = ObjectReference("VirtualMachine", manifest.source.vmMoid)
    let now = try Inventory(client, source, stop: stop).capture(object, stop: stop)
    let name = manifest.vm.name.printable
    // Of a VM that ran, and of one whose disks were under a snapshot since, only what it is.
    let isIdentity = source.snapshot && (isOff || manifest.vm.powerState != .poweredOff)
    let (then, current) = (manifest.source.fingerprint, now.source.fingerprint)
    guard isIdentity ? current.prefix(32) == then.prefix(32) : current == then else {
        throw MigrationError(
            .failedPrecondition, "VM \(name) or one of its disks changed since it was captured",
            hint: "make sure that nobody works on it and run the same command again")
    }
    guard now.vm.powerState == .poweredOff || (source.snapshot && !isOff && now.vm.powerState == .poweredOn) else {
        throw MigrationError(
            .failedPrecondition, "VM \(name) is \(now.vm.powerState == .poweredOn ? "running" : "not shut down")",
            hint: "shut it down, or move it as a snapshot finds it (--snapshot)")
    }
}
