import Export
import FlotillaProtocol
import Glibc
package import HostKit
package import MigrationModel
import Synchronization

/// What an export may leave on the server, on stable storage before it is made there. The process that finds such a
/// record of another takes it away.
struct ExportRecord: Sendable {
    /// Seconds that a snapshot which isn't there may still be on its way: the server may get the request late.
    private static let patience = 3600
    /// Of exports under way in this process.
    private static let underWay = Mutex<Set<String>>([])

    /// "TASK.RANDOM".
    let path: String
    var authority: String
    var user: String
    var vm: String
    var snapshot = ""
    var lease = ""

    init(folder: String, task: String, server: VIMServer, vm: String) throws {
        try Files.createDirectories(folder, mode: 0o700)
        path = "\(folder)/\(task).\(String(UInt64.random(in: 0 ... .max), radix: 36))"
        (authority, user) = (server.authority, server.user)
        self.vm = vm
        _ = Self.underWay.withLock { [path] in $0.insert(path) }
    }

    /// nil for a file that holds no record.
    init?(path: String) {
        guard let bytes = try? Files.read(path, limit: 64 << 10), let text = String(validating: bytes, as: UTF8.self)
        else { return nil }
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        guard lines.count >= 6, lines[0] == "flotilla export 1" else { return nil }
        self.path = path
        (authority, user, vm, snapshot, lease) = (lines[1], lines[2], lines[3], lines[4], lines[5])
    }

    func save() throws {
        let lines = ["flotilla export 1", authority, user, vm, snapshot, lease, ""]
        try Files.writeAtomically(Array(lines.joined(separator: "\n").utf8), to: path)
    }

    func remove() throws { try Files.remove(path) }

    static func isUnderWay(_ path: String) -> Bool { underWay.withLock { $0.contains(path) } }

    /// Its export is over: what that left is anybody's to take away.
    func release() { _ = Self.underWay.withLock { $0.remove(path) } }

    /// Ends the lease and removes the snapshot, if they are still there. The record stays while a snapshot that isn't there
    /// may still come.
    ///
    /// - Parameter isSettled: whether the server said that it made none.
    /// - Throws: `unavailable` while the server makes a snapshot of the VM.
    func sweep(_ client: VIMClient, isSettled: Bool = false, stop: StopFlag) throws {
        if !lease.isEmpty {
            _ = try? client.answer(VIMRequest("HttpNfcLeaseAbort", on: ObjectReference("HttpNfcLease", lease)), stop)
        }
        if !snapshot.isEmpty {
            do {
                let object = ObjectReference("VirtualMachine", vm)
                // Asked first: what is made meanwhile is in the tree.
                let isBusy = try client.isMakingSnapshot(of: object, stop: stop)
                let found = Self.snapshots(named: snapshot, try snapshots(client, stop))
                for each in found { try client.removeSnapshot(each, stop: stop) }
                // What has a lease was there once.
                if found.isEmpty, lease.isEmpty, !isSettled {
                    guard !isBusy else {
                        throw MigrationError(
                            .unavailable, "\(client.server.authority): a snapshot of VM \(vm) is still being made",
                            hint: "wait until its task has ended on the source; then \(snapshot) is removed")
                    }
                    if try age < Self.patience { return }
                }
            } catch let error as MigrationError where error.code == .notFound {
                // The VM itself is gone.
            }
        }
        try remove()
    }

    /// Throws `failedPrecondition` unless the snapshot just made is the VM's only one, and of the very files that were
    /// captured. Others may hold what it wrote until then: a backup's snapshot, or one whose removal left its files.
    func requireCapturedFiles(
        of made: ObjectReference, _ manifest: Manifest, _ client: VIMClient, stop: StopFlag
    ) throws {
        let name = manifest.vm.name.printable
        let roots = try snapshots(client, stop)
        guard roots.count == 1, roots[0].text("name").map(unescapedName) == snapshot else {
            throw MigrationError(
                .failedPrecondition, "VM \(name) got a snapshot from somebody else since it was captured",
                hint: "wait until that is gone (a backup?), then run the same command again")
        }
        let hardware = try client.properties(["config.hardware"], of: made, stop: stop)["config.hardware"]
        let files = Set((hardware?.all("device") ?? []).compactMap { $0["backing"]?.text("fileName") })
        for disk in manifest.disks where !files.contains(disk.source.path) {
            throw MigrationError(
                .failedPrecondition,
                "VM \(name) does not write \(disk.id) to \(disk.source.path.printable) any more",
                hint: "it did when it was captured: consolidate it if vSphere asks for that, then try again")
        }
    }

    /// Throws `failedPrecondition` when the snapshot is gone: its removal merges what the VM wrote since into the files that
    /// are read. It leaves the list before that begins.
    func requireSnapshot(of manifest: Manifest, _ client: VIMClient, stop: StopFlag) throws {
        guard Self.snapshots(named: snapshot, try snapshots(client, stop)).isEmpty else { return }
        throw MigrationError(
            .failedPrecondition,
            "somebody removed snapshot \(snapshot) of VM \(manifest.vm.name.printable) while its disks were read",
            hint: "let no backup or clean-up touch it meanwhile, and run the same command again")
    }

    private func snapshots(_ client: VIMClient, _ stop: StopFlag) throws -> [VIMNode] {
        let tree = try client.properties(["snapshot"], of: ObjectReference("VirtualMachine", vm), stop: stop)
        return tree["snapshot"]?.all("rootSnapshotList") ?? []
    }

    /// Seconds since it was written.
    private var age: Int {
        get throws { time(nil) - Int(try File(path, O_RDONLY).status().st_mtim.tv_sec) }
    }

    private static func snapshots(named name: String, _ trees: [VIMNode]) -> [ObjectReference] {
        trees.flatMap { tree in
            (tree.text("name").map(unescapedName) == name ? [tree.reference("snapshot")].compactMap { $0 } : [])
                + snapshots(named: name, tree.all("childSnapshotList"))
        }
    }
}

/// Takes away what exports of processes that died left on servers. Blocking.
///
/// - Parameters:
///   - records: paths of records, as `leftExports` found them.
/// - Returns: what could not be taken away, and why.
package func sweepExports(_ records: [String], servers: [VIMServer], stop: StopFlag) -> [MigrationError] {
    var failures: [MigrationError] = []
    for path in records {
        guard let record = ExportRecord(path: path) else { continue }
        let what = "what an interrupted export left on \(record.authority) (VM \(record.vm))"
        guard let server = servers.first(where: { $0.authority == record.authority && $0.user == record.user }) else {
            failures.append(
                MigrationError(
                    .failedPrecondition, "\(what) can't be removed: no source \(record.user)@\(record.authority)",
                    hint: record.snapshot.isEmpty
                        ? "an export lease there ends by itself; delete \(path)"
                        : "look there for the snapshot \(record.snapshot), then delete \(path)"))
            continue
        }
        do {
            let client = try VIMClient(server, stop: stop)
            defer { client.close() }
            try record.sweep(client, stop: stop)
        } catch {
            failures.append(MigrationError(.unavailable, "\(what) can't be removed", hint: nil, cause: error))
        }
    }
    return failures
}

/// Records in the folder: all of exports that are over, or whichever a task has.
package func leftExports(in folder: String, task: String? = nil) throws -> [String] {
    guard Files.exists(folder) else { return [] }
    return try Files.list(folder)
        .filter { name in !name.hasSuffix(".tmp") && (task.map { name.hasPrefix($0 + ".") } ?? true) }
        .map { "\(folder)/\($0)" }
        .filter { task != nil || !ExportRecord.isUnderWay($0) }
}
