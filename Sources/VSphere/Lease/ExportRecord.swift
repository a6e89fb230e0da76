import Export
package import HostKit
package import MigrationModel

/// What an export may leave on the server, on stable storage before it is made there. The process that finds such a
/// record of another takes it away.
struct ExportRecord: Sendable {
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

    /// Ends the lease and removes the snapshot, if they are still there.
    func sweep(_ client: VIMClient, stop: StopFlag) throws {
        if !lease.isEmpty {
            _ = try? client.answer(VIMRequest("HttpNfcLeaseAbort", on: ObjectReference("HttpNfcLease", lease)), stop)
        }
        if !snapshot.isEmpty {
            do {
                let object = ObjectReference("VirtualMachine", vm)
                let tree = try client.properties(["snapshot"], of: object, stop: stop)["snapshot"]
                for found in Self.snapshots(named: snapshot, tree?.all("rootSnapshotList") ?? []) {
                    try client.removeSnapshot(found, stop: stop)
                }
            } catch let error as MigrationError where error.code == .notFound {
                // The VM itself is gone.
            }
        }
        try remove()
    }

    /// Throws `failedPrecondition` when the VM has another snapshot than the one just made: the files that were captured are
    /// not those that it wrote to until then.
    func requireOnlySnapshot(_ client: VIMClient, vmName: String, stop: StopFlag) throws {
        let object = ObjectReference("VirtualMachine", vm)
        let tree = try client.properties(["snapshot"], of: object, stop: stop)["snapshot"]
        let roots = tree?.all("rootSnapshotList") ?? []
        guard roots.count == 1, roots[0].text("name").map(unescapedName) == snapshot else {
            throw MigrationError(
                .failedPrecondition, "VM \(vmName.printable) got a snapshot from somebody else since it was captured",
                hint: "wait until that is gone (a backup?), then run the same command again")
        }
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

/// Records in the folder: of all tasks, or of one.
package func leftExports(in folder: String, task: String? = nil) throws -> [String] {
    guard Files.exists(folder) else { return [] }
    return try Files.list(folder)
        .filter { name in !name.hasSuffix(".tmp") && (task.map { name.hasPrefix($0 + ".") } ?? true) }
        .map { "\(folder)/\($0)" }
}
