import FlotillaProtocol
import HostKit
import MigrationModel

/// Makes and destroys vGPUs of this host: time-sliced and MIG-backed, as mediated devices or on the vendor's VFIO path.
///
/// One caller at a time, by a lock between processes. What is about to be made is on disk before the kernel is asked, and
/// success means that sysfs says so when read back. Blocks for the vendor's driver and programs.
package struct VgpuHost: Sendable {
    let sysfs: Sysfs
    let kernel: any SysfsWriter
    let tools: VgpuTools
    let store: VgpuRecords
    let migs: MIGRecords
    let ledger: GPULedger
    let boot: String
    let proc: String
    private let lock: String

    /// - Parameters:
    ///   - folder: of the records and the lock; the ledger lies there too.
    ///   - boot: the running kernel's boot id.
    ///   - proc: where procfs is mounted.
    package init(
        sysfs: Sysfs = Sysfs(), kernel: (any SysfsWriter)? = nil, tools: VgpuTools = VgpuTools(),
        folder: String = GPULedger.folder, ledger: GPULedger? = nil, boot: String = bootID(),
        proc: String = "/proc"
    ) {
        self.sysfs = sysfs
        self.kernel = kernel ?? KernelWriter(sysfs)
        self.tools = tools
        self.ledger = ledger ?? GPULedger(folder: folder)
        self.boot = boot
        self.proc = proc
        store = VgpuRecords(path: "\(folder)/vgpus.json")
        migs = MIGRecords(path: "\(folder)/mig.json")
        lock = "\(folder)/vgpus.lock"
    }

    /// All that flotilla made here, in the order they were made.
    package func records() throws -> [VgpuRecord] { try store.read() }

    /// Every function that can hold vGPUs, in address order.
    package func places() -> [VgpuPlace] {
        sysfs.list("bus/pci/devices").compactMap(PciAddress.init).sorted().compactMap { VgpuPlace($0, sysfs: sysfs) }
    }

    /// Makes a vGPU of this profile for `owner`'s `device`, or returns the one that is there from before.
    ///
    /// - Parameters:
    ///   - gpu: physical function to make it on; nil: whichever has room.
    ///   - others: functions that are not to be used, nor their parts: see `functionsOfOthers`.
    ///   - parameters: "name=value" for the driver, from `vgpuParameters`.
    /// - Throws: `resourceExhausted` when no GPU has room, naming who has the vGPUs there are; `aborted` for a stale fence.
    package func create(
        _ profile: VgpuProfile, for owner: GPUOwner, device: String, on gpu: PciAddress? = nil,
        besides others: Set<PciAddress> = [], parameters: [String] = []
    ) throws -> VgpuRecord {
        try exclusively {
            if let gpu { try requireGPU(gpu) }
            if profile.gpuInstance != nil { try settleInstances() }
            if let known = try store.read().first(where: { $0.owner.isSame(as: owner) && $0.device == device }) {
                try requireSame(known, profile, on: gpu)
                // Also checks the fence.
                if let resource = known.resource { try ledger.reserve([resource], for: owner) }
                if isWanted(known, profile, parameters) {
                    var kept = known
                    kept.owner = owner
                    if isWhole(kept) { try store.put(kept) } else { try complete(&kept) }
                    return kept
                }
                try remove(known, as: owner)
            }
            if let gpu { try enableVirtualFunctions(of: gpu) }
            var failures: [MigrationError] = []
            func attempt(on gpu: PciAddress?) throws -> VgpuRecord? {
                for place in candidates(for: profile, on: gpu, besides: others) {
                    // Read again after every attempt: the offers change.
                    guard let type = place.type(of: profile) else { continue }
                    do {
                        return try make(type, at: place, for: owner, device: device, parameters)
                    } catch let error as MigrationError where error.code != .aborted {
                        failures.append(error)
                    }
                }
                return nil
            }
            if let made = try attempt(on: gpu) { return made }
            guard profile.gpuInstance != nil else { throw try failures.first ?? noRoom(for: profile, on: gpu) }
            for rearranging in [false, true] {
                for card in partitionable(on: gpu, besides: others) {
                    do {
                        try addInstance(for: profile, on: card, for: owner, device: device, rearranging: rearranging)
                        if let made = try attempt(on: card) { return made }
                        try removeInstance(of: owner, device: device, isNew: true)
                    } catch let error as MigrationError where error.code != .aborted {
                        // While a change could not be taken back no other may begin.
                        if try migs.read().change != nil { throw error }
                        failures.append(error)
                    }
                }
            }
            throw try noRoom(for: profile, on: gpu, failures)
        }
    }

    /// Something of this host was made for the owner's migration.
    package func holds(_ owner: GPUOwner) throws -> Bool {
        try store.read().contains { $0.owner.isSame(as: owner) }
            || migs.read().made.contains { $0.owner.isSame(as: owner) }
    }

    /// Destroys what the owner's migration has, or only its `device`. What is gone already is fine.
    ///
    /// - Throws: `aborted` for a stale fence, `failedPrecondition` while a VM has one.
    package func destroy(of owner: GPUOwner, device: String? = nil) throws {
        try exclusively {
            guard try holds(owner) else { return }
            try ledger.update { try $0.admit(owner) }
            for record in try store.read()
            where record.owner.isSame(as: owner) && (device.map { record.device == $0 } ?? true) {
                try remove(record, as: owner)
            }
            for made in try instancesWithoutVgpu()
            where made.owner.isSame(as: owner) && (device.map { made.device == $0 } ?? true) {
                try removeInstance(of: made.owner, device: made.device)
            }
        }
    }

    /// Destroys what was made for this domain, or only its `device`, for a person: whichever attempt made it.
    /// Returns that.
    package func destroy(ofDomain domain: String, device: String? = nil) throws -> [VgpuRecord] {
        let records = try records(ofDomain: domain, device: device)
        for record in records { try destroy(of: ledger.newest(record.owner), device: record.device) }
        return records
    }

    package func records(ofDomain domain: String, device: String? = nil) throws -> [VgpuRecord] {
        try store.read().filter { $0.owner.domain == domain && (device == nil || device == $0.device) }
    }

    /// Notes that it is this libvirt which has the domains of these migrations.
    func note(_ libvirt: String, ofMigrations migrations: Set<String>) throws {
        func isUnknown(_ record: VgpuRecord) -> Bool {
            !record.owner.migration.isEmpty && migrations.contains(record.owner.migration)
                && record.owner.libvirt != libvirt
        }
        guard try store.read().contains(where: isUnknown) else { return }
        try exclusively {
            for var record in try store.read() where isUnknown(record) {
                record.owner.libvirt = libvirt
                try store.put(record)
            }
        }
    }

    /// Destroys those of migrations that are gone. One that can't be destroyed now keeps its record, and is `left`.
    ///
    /// - Parameters:
    ///   - named: keys of what domains name, which stays whosever it was.
    ///   - isGone: asked under the lock that every maker of a vGPU holds.
    func reap(
        besides named: Set<String> = [], _ isGone: (GPUOwner) throws -> Bool
    ) throws -> (destroyed: [VgpuRecord], left: [Finding]) {
        guard try !store.read().isEmpty || !migs.read().made.isEmpty else { return ([], []) }
        return try exclusively {
            var left: [Finding] = []
            func attempt(_ what: String, on address: String, of owner: GPUOwner, _ body: () throws -> Void) -> Bool {
                do { try body() } catch {
                    let hint = (error as? MigrationError)?.hint ?? "end what uses it"
                    left.append(
                        .warning(
                            address,
                            "\(what) on \(address) was made for \(owner), which is not there, and can't be destroyed: "
                                + ((error as? MigrationError)?.message ?? "\(error)"),
                            remedy: "\(hint); the worker tries again when it is started"))
                    return false
                }
                return true
            }
            let destroyed = try store.read().filter { record in
                if let key = record.resource?.key, named.contains(key) { return false }
                guard try !record.owner.migration.isEmpty && isGone(record.owner) else { return false }
                let owner = try ledger.newest(record.owner)
                return attempt("the vGPU \(record.profile)", on: record.function, of: owner) {
                    try remove(record, as: owner)
                }
            }
            // One of a vGPU that could not be destroyed stays with it.
            for made in try instancesWithoutVgpu() where try !made.owner.migration.isEmpty && isGone(made.owner) {
                _ = attempt("the GPU instance \(made.instance.name)", on: made.gpu, of: made.owner) {
                    try removeInstance(of: made.owner, device: made.device)
                }
            }
            return (destroyed, left)
        }
    }

    /// Makes again what a reboot took, at the places where it was: domains name those. Also sets the parameters of what
    /// mdevctl made again, which has none. Returns what was made or set.
    ///
    /// - Throws: the first failure, after trying all.
    @discardableResult
    package func restore() throws -> [VgpuRecord] {
        try exclusively {
            var made: [VgpuRecord] = []
            var failure: (any Error)?
            do { try settleInstances() } catch { failure = error }
            for var record in try store.read() {
                do {
                    if exists(record) {
                        // What was not finished is its maker's to go on with.
                        guard record.phase == .present, !isWhole(record) else { continue }
                        try complete(&record)
                        made.append(record)
                        continue
                    }
                    guard record.phase == .present else {
                        try remove(record, as: ledger.newest(record.owner))
                        continue
                    }
                    if let physical = PciAddress(record.physical), record.physical != record.function {
                        try enableVirtualFunctions(of: physical)
                    }
                    let profile = VgpuProfile(record.profile)
                    if profile.gpuInstance != nil, let physical = PciAddress(record.physical),
                        place(of: record)?.type(of: profile) == nil
                    {
                        try addInstance(for: profile, on: physical, for: record.owner, device: record.device)
                    }
                    if let place = place(of: record), let type = place.type(of: VgpuProfile(record.profile)) {
                        if type.id != record.typeID {
                            // Another version of the driver numbers its types anew.
                            record.typeID = type.id
                            try store.put(record)
                        }
                        try write(record, type: type.id, at: place)
                    } else if let type = place(of: record)?.currentType, !exists(record) {
                        throw MigrationError(
                            .failedPrecondition,
                            "\(record.function) has a vGPU of type \(type), and is to be a \(record.profile) for \(record.owner)",
                            hint: "destroy that one, then run flotilla gpu restore")
                    } else if !exists(record) {
                        // Nor did mdevctl make it as soon as its function was there.
                        throw MigrationError(
                            .failedPrecondition, "\(record.function) offers no \(record.profile) after the reboot",
                            hint: "check that the vendor's vGPU host driver is loaded")
                    }
                    try complete(&record)
                    made.append(record)
                } catch { failure = failure ?? error }
            }
            if let failure { throw failure }
            return made
        }
    }

    package func exclusively<Value>(_ body: () throws -> Value) throws -> Value {
        try Files.createDirectories(Files.parent(of: lock), mode: 0o700)
        return try FileLock.holding(lock, body)
    }

    /// GPUs that have vGPUs already come first: an empty one stays free for another size, or to be handed over whole.
    func candidates(
        for profile: VgpuProfile, on gpu: PciAddress?, besides others: Set<PciAddress> = []
    ) -> [VgpuPlace] {
        let all = places().filter { gpu == nil || $0.physical == gpu }
        let used = Set(all.filter { !$0.mediatedDevices.isEmpty || $0.currentType != nil }.map(\.physical))
        let free = all.filter { !$0.isOccupied && !$0.isPart(of: others) && $0.type(of: profile) != nil }
        return free.filter { used.contains($0.physical) } + free.filter { !used.contains($0.physical) }
    }

    func noRoom(
        for profile: VgpuProfile, on gpu: PciAddress?, _ causes: [MigrationError] = []
    ) throws -> MigrationError {
        let all = places().filter { gpu == nil || $0.physical == gpu }
        let owners = try store.read().filter { record in all.contains { "\($0.function)" == record.function } }
            .map { "\($0.profile) on \($0.function) for \($0.owner)" }
        let offers = Set(all.flatMap { $0.types().filter { $0.available > 0 }.map(\.name) }).sorted()
        let there =
            (owners.isEmpty ? "" : "; there are \(owners.joined(separator: ", "))")
            + causes.indices.filter { index in !causes[..<index].contains { $0.message == causes[index].message } }
            .prefix(4).map { "; \(causes[$0].message)" }.joined()
        if profile.gpuInstance != nil, let modes = tools.migModes() {
            let off = Set(all.map(\.physical)).filter { modes[$0] == "disabled" }.sorted()
            if !off.isEmpty, !all.contains(where: { modes[$0.physical] == "enabled" }) {
                return MigrationError(
                    .failedPrecondition,
                    "a vGPU \(profile) needs a GPU in MIG mode, and none is: \(off.map(\.description).joined(separator: ", "))",
                    hint: enableMIGHint("\(off[0])"))
            }
        }
        return MigrationError(
            causes.allSatisfy { $0.code == .failedPrecondition } && !causes.isEmpty
                ? .failedPrecondition : .resourceExhausted,
            "no GPU of this host has room for a vGPU \(profile)\(there)",
            hint: causes.last?.hint
                ?? (!offers.isEmpty
                    ? "now it can make \(offers.joined(separator: ", "))"
                    : all.isEmpty
                        ? "enable the virtual functions: flotilla gpu profiles --enable \(gpu.map { "\($0)" } ?? "ADDRESS")"
                        : "destroy vGPUs, or choose another \(gpu == nil ? "host" : "GPU")"))
    }
}

/// - Parameter gpu: its address.
func enableMIGHint(_ gpu: String) -> String {
    "take everything off the GPU, then flotilla gpu profiles --enable-mig \(gpu) (nvidia-smi -i \(gpu) -mig 1); if it "
        + "stays pending, the GPU has to be reset or the host rebooted"
}
