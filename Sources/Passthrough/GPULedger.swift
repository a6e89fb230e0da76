import FoundationEssentials
import Glibc
import HostKit
import MigrationModel

/// Who owns which function and mediated device of this host. One per host, shared by all processes: every change takes
/// a lock between processes, reads the file, and replaces it atomically, so that of two who race for a device exactly one
/// gets it, and what was answered survives a crash.
///
/// The life of a resource: free -> `reserve` -> reserved -> `handOver` to a domain -> `release` -> dirty -> `reset` ->
/// free. One that no domain was given is free when released; a mediated device or vGPU that was destroyed leaves nothing
/// behind: `forget`. Calls block for the disk; `reset` for the device too.
package struct GPULedger: Sendable {
    package static let folder = "/var/lib/flotilla/gpu"

    struct Book: Codable {
        var version = 1
        var entries: [GPUReservation] = []
        /// The largest fence seen of each migration: an attempt that is over must not come back.
        var fences: [String: UInt64] = [:]
        /// Migrations in the order of their last change, so that old fences can go.
        var order: [String] = []
    }

    /// Migrations whose fences are remembered beyond those that own something.
    private static let remembered = 10_000

    let path: String
    let boot: String
    private let startedByKexec: Bool
    let keeper: Keeper

    /// - Parameters:
    ///   - folder: made by the first change.
    ///   - boot: the running kernel's boot id.
    ///   - startedByKexec: another kernel started this one, which resets no device.
    package init(
        folder: String = GPULedger.folder, boot: String = bootID(), startedByKexec: Bool = wasStartedByKexec()
    ) {
        path = "\(folder)/ledger.json"
        self.boot = boot
        self.startedByKexec = startedByKexec
        keeper = Keeper(folder: folder)
    }

    // MARK: - Reading

    /// Every resource that isn't free, by key. Empty when nothing was ever reserved.
    package func reservations() throws -> [GPUReservation] { try read().entries }

    /// What all attempts of a migration hold.
    package func reservations(of migration: String) throws -> [GPUReservation] {
        try reservations().filter { $0.owner.migration == migration && $0.state == .reserved }
    }

    /// Another process, which lives, took what the owner's migration holds.
    func isKeptByAnother(_ owner: GPUOwner) throws -> Bool {
        try FileLock.holding("\(path).lock") {
            try reservations(of: owner.migration).contains { $0.keeper.map(keeper.isOther) ?? false }
        }
    }

    // MARK: - Changing

    /// Takes all of them or none. Taking again what the same migration holds (or left dirty: it is its own data) is fine.
    /// What an earlier attempt holds beyond `resources` stays reserved: see `reservations(of:)`.
    ///
    /// - Throws: `resourceExhausted` naming who has it, `failedPrecondition` for a device that is dirty, `aborted` for a
    ///   stale fence.
    package func reserve(_ resources: [GPUResource], for owner: GPUOwner) throws {
        try update { book in
            try book.admit(owner)
            for resource in resources { try book.requireFree(resource, for: owner) }
            guard !resources.isEmpty else { return }
            let (now, process) = (Moment.now.milliseconds, try keeper.own())
            for resource in Set(resources) {
                let earlier = book.entries.first { $0.resource.key == resource.key }
                book.entries.removeAll { $0.resource.key == resource.key }
                book.entries.append(
                    GPUReservation(
                        resource: resource, owner: owner, state: .reserved, since: now, keeper: process,
                        isUntouched: earlier.map { $0.state == .reserved && $0.isUntouched == true } ?? true))
            }
        }
    }

    /// Throws what `reserve` would say of one that another owner has. Changes nothing.
    func requireFree(_ resource: GPUResource, for owner: GPUOwner) throws {
        try read().requireFree(resource, for: owner)
    }

    /// A domain is about to have what `owner`'s migration holds: from now on it is dirty when it is given back.
    ///
    /// - Throws: `aborted` for a stale fence.
    package func handOver(to owner: GPUOwner) throws {
        try update { book in
            try book.admit(owner)
            for index in book.entries.indices where book.entries[index].owner.isSame(as: owner) {
                book.entries[index].isUntouched = nil
            }
        }
    }

    /// Notes that `owner`'s domain names these, whoever put them there. What another one has, or left its data in, stays
    /// that one's.
    ///
    /// - Throws: `aborted` for a stale fence.
    package func handOver(_ resources: [GPUResource], to owner: GPUOwner) throws {
        guard !resources.isEmpty else { return }
        try update { book in
            try book.admit(owner)
            let (now, process) = (Moment.now.milliseconds, try keeper.own())
            for resource in resources {
                guard !book.entries.contains(where: { $0.resource.overlaps(resource) && !$0.owner.isSame(as: owner) })
                else { continue }
                book.entries.removeAll { $0.resource.key == resource.key }
                book.entries.append(
                    GPUReservation(resource: resource, owner: owner, state: .reserved, since: now, keeper: process))
            }
        }
    }

    /// The owner under the newest fence the ledger knows of its migration: for clearing up after attempts that are over.
    func newest(_ owner: GPUOwner) throws -> GPUOwner {
        var newest = owner
        newest.fence = max(owner.fence, try read().fences[owner.migration] ?? 0)
        return newest
    }

    /// Gives back what `owner`'s migration holds of these; nil: all of it. What it doesn't hold is left alone. What a
    /// domain had is dirty then. Returns that.
    ///
    /// - Throws: `aborted` for a stale fence.
    @discardableResult
    package func release(_ resources: [GPUResource]? = nil, of owner: GPUOwner) throws -> [GPUResource] {
        try update { book in
            try book.admit(owner)
            return book.release(boot: boot) { entry in
                entry.owner.isSame(as: owner)
                    && resources.map { $0.contains { $0.key == entry.resource.key } } ?? true
            }
        }
    }

    /// Drops resources that no longer exist: a destroyed mediated device, a deleted vGPU. Nothing of theirs is dirty.
    ///
    /// - Throws: `aborted` for a stale fence.
    package func forget(_ resources: [GPUResource], of owner: GPUOwner) throws {
        try update { book in
            try book.admit(owner)
            book.entries.removeAll { entry in
                entry.owner.isSame(as: owner) && resources.contains { $0.key == entry.resource.key }
            }
        }
    }

    // MARK: - The file

    /// One change, seen by all or by none.
    func update<Value>(_ body: (inout Book) throws -> Value) throws -> Value {
        try Files.createDirectories(Files.parent(of: path), mode: 0o700)
        return try FileLock.holding("\(path).lock") {
            var book = try read()
            let value = try body(&book)
            book.entries.sort { $0.resource < $1.resource }
            let owning = Set(book.entries.map(\.owner.migration))
            let surplus = book.order.count - Self.remembered
            if surplus > 0 {
                let old = Set(book.order.prefix(surplus)).subtracting(owning)
                book.order.removeAll(where: old.contains)
                for migration in old { book.fences[migration] = nil }
            }
            let encoder = JSONEncoder()
            encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
            try Files.writeAtomically([UInt8](encoder.encode(book)), to: path)
            return value
        }
    }

    private func read() throws -> Book {
        guard Files.exists(path) else { return Book() }
        let bytes = try Files.read(path)
        guard var book = try? JSONDecoder().decode(Book.self, from: Data(bytes)), book.version == 1 else {
            throw MigrationError(
                .dataLoss, "the ledger of reserved devices, \(path), is damaged or of another version",
                hint: "move it away and restart the worker: it is made again from libvirt's domains")
        }
        if !startedByKexec { book.entries.removeAll { $0.state == .dirty && $0.boot != boot } }
        return book
    }
}

extension GPULedger.Book {
    /// Refuses an attempt that a later one has replaced, and remembers the fence of one that is not.
    mutating func admit(_ owner: GPUOwner) throws {
        guard !owner.migration.isEmpty else { return }
        let newest = fences[owner.migration] ?? 0
        guard owner.fence >= newest else {
            throw MigrationError(
                .aborted, "fence \(owner.fence) of \(owner) is stale: \(newest) holds its devices")
        }
        fences[owner.migration] = owner.fence
        order.removeAll { $0 == owner.migration }
        order.append(owner.migration)
    }

    fileprivate func requireFree(_ resource: GPUResource, for owner: GPUOwner) throws {
        for entry in entries where entry.resource.overlaps(resource) && !entry.owner.isSame(as: owner) {
            let what = entry.resource == resource ? "\(resource)" : "\(resource) goes with \(entry.resource), which"
            if entry.state == .dirty {
                throw MigrationError(
                    .failedPrecondition, "\(what) still holds what \(entry.owner) left in it: it was not reset since",
                    hint: "flotilla gpu reset \(entry.resource), or reboot the host (not by kexec)")
            }
            throw MigrationError(
                .resourceExhausted, "\(what) is reserved for \(entry.owner)",
                hint: entry.owner.migration.isEmpty && entry.isUntouched == true
                    ? "choose another device; or take back what was made for it, finished or not: flotilla gpu destroy "
                        + "--domain \(entry.owner.domain)"
                    : "choose another device, or undeploy that domain first; if it is gone, restart the worker")
        }
    }

    /// Makes reserved entries dirty, and drops those that no domain had.
    mutating func release(boot: String, where isChosen: (GPUReservation) -> Bool) -> [GPUResource] {
        let now = Moment.now.milliseconds
        var released: [GPUResource] = []
        entries.removeAll { $0.state == .reserved && $0.isUntouched == true && isChosen($0) }
        for index in entries.indices where entries[index].state == .reserved && isChosen(entries[index]) {
            entries[index].state = .dirty
            entries[index].since = now
            entries[index].boot = boot
            entries[index].keeper = nil
            released.append(entries[index].resource)
        }
        return released
    }
}

/// The running kernel's id of this boot; empty where procfs is not there.
package func bootID() -> String {
    let bytes = (try? Files.read("/proc/sys/kernel/random/boot_id", limit: 4096)) ?? []
    return String(decoding: bytes.prefix { $0 != 0x0a }, as: UTF8.self)
}

/// Whether a kernel that ran before started the running one, and not the firmware.
///
/// Source: Documentation/arch/x86/boot.rst, `type_of_loader` (0xD), and drivers/of/kexec.c for device trees.
package func wasStartedByKexec(proc: Sysfs = Sysfs(root: "/proc")) -> Bool {
    proc.number("sys/kernel/bootloader_type").map { $0 >> 4 == 0xd } ?? false
        || proc.exists("device-tree/chosen/linux,booted-from-kexec")
}
