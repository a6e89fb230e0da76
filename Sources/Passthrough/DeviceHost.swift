package import FlotillaProtocol
import HostKit
import MigrationModel

/// The devices of a host as a worker has them in hand. Tests put a made tree in the kernel's place.
package struct DeviceHost: Sendable {
    package var sysfs: Sysfs
    package var kernel: any SysfsWriter
    package var tools: VgpuTools
    /// Holds the ledger, the records of vGPUs and the journal of drivers: one per host, whatever uses it.
    package var folder: String

    /// - Parameter kernel: takes the writes; nil: the kernel behind `sysfs`.
    package init(
        sysfs: Sysfs = Sysfs(), kernel: (any SysfsWriter)? = nil, tools: VgpuTools = VgpuTools(),
        folder: String = GPULedger.folder
    ) {
        self.sysfs = sysfs
        self.kernel = kernel ?? KernelWriter(sysfs)
        self.tools = tools
        self.folder = folder
    }

    package var ledger: GPULedger { GPULedger(folder: folder) }
    package var vgpus: VgpuHost { VgpuHost(sysfs: sysfs, kernel: kernel, tools: tools, folder: folder) }
    private var binder: Binder { Binder(sysfs: sysfs, kernel: kernel, folder: folder) }

    /// Throws `aborted` when a later attempt of the owner's migration holds its devices.
    package func requireNewest(_ owner: GPUOwner) throws {
        // Where nothing is held nothing is written.
        if try !ledger.reservations(of: owner.migration).isEmpty { try ledger.update { try $0.admit(owner) } }
    }

    /// Destroys the vGPUs of the owner's migration and gives its functions back; what is gone already is fine.
    ///
    /// - Returns: functions that are dirty then.
    /// - Throws: `aborted` for a stale fence.
    @discardableResult
    package func giveBack(of owner: GPUOwner) throws -> [PciAddress] {
        if try vgpus.holds(owner) { try vgpus.destroy(of: owner) }
        guard try !ledger.reservations(of: owner.migration).isEmpty else { return [] }
        return try ledger.release(of: owner).compactMap(\.function)
    }

    /// Resets functions that a VM gave back, with those that go with them: takes them from their drivers, resets what is
    /// dirty, and gives them back. One that can't be reset stays dirty.
    ///
    /// - Returns: what was dirty and is free now.
    /// - Throws: `failedPrecondition` when it is refused, or the kernel can't reset one: nothing was changed. What fails
    ///   later says what was reset.
    package func reset(_ addresses: [PciAddress], observe: () throws -> DeviceTree) throws -> [PciAddress] {
        let tree = try observe()
        let dirty = try dirty(with: addresses, in: tree)
        guard !dirty.isEmpty else { return [] }
        // A function that was bound before stays so, and what else a bind puts right is not asked for.
        let together = try Set(Handover(addresses, in: tree).functions.map(\.function.address))
        let moved = try Set(
            binder.bind(addresses, observe: observe).filter { $0.to == Binder.driver }.map(\.address)
        ).intersection(together)
        let outcome = Result { try ledger.reset(dirty, sysfs: sysfs, kernel: kernel) }
        do {
            if !moved.isEmpty { _ = try binder.release(addresses, only: moved, observe: observe) }
            try outcome.get()
        } catch var error as MigrationError {
            if error.code == .failedPrecondition { error.code = .internal }
            let left = try ledger.reservations().filter { $0.state == .dirty }.map(\.resource)
            let done = dirty.filter { !left.contains($0) }
            if !done.isEmpty { error.message += "; reset: \(done.map(\.description).joined(separator: ", "))" }
            throw error
        }
        return dirty.compactMap(\.function)
    }

    /// What `reset` would write; changes nothing. Throws what `reset` would refuse with.
    package func plan(reset addresses: [PciAddress], observe: () throws -> DeviceTree) throws -> [SysfsWrite] {
        let tree = try observe()
        let dirty = try dirty(with: addresses, in: tree)
        guard !dirty.isEmpty else { return [] }
        let plan = try binder.plan(bind: addresses, observe: { tree })
        return plan.writes + dirty.compactMap(\.resetting) + binder.writesBack(after: plan)
    }

    /// Dirty functions among these and those that go with them. Throws `failedPrecondition` for one that can't be reset.
    private func dirty(with addresses: [PciAddress], in tree: DeviceTree) throws -> [GPUResource] {
        let together = try Handover(addresses, in: tree).functions.map(\.address)
        let dirty = try ledger.reservations().filter { $0.state == .dirty }.map(\.resource).filter { resource in
            resource.function.map(together.contains) ?? false
        }
        for resource in dirty { try resource.requireReset(sysfs) }
        return dirty
    }

    /// Puts right what processes that are gone left: drivers half moved, vGPUs and reservations without a domain. What a
    /// process that lives has is left alone, and what another libvirt of this host has, or one that nobody noted: which
    /// domains that has is not known here. Call at start, before tasks run; blocks.
    ///
    /// - Parameters:
    ///   - libvirt: the URI that was asked for the domains.
    ///   - domains: all it has, also those that are shut off.
    ///   - underWay: migrations whose tasks the worker's journal still has.
    /// - Returns: what was changed or can't be right, for the log.
    package func recover(
        libvirt: String, domains: [GPULedger.Domain], underWay: Set<String>
    ) throws -> [Finding] {
        // A host that has handed out nothing gets no files.
        guard Files.isDirectory(folder) || domains.contains(where: { !$0.resources.isEmpty }) else { return [] }
        var findings: [Finding] = []
        do {
            findings += try binder.recover().map { change in
                .make(
                    .note, change.address,
                    "\(change.address) is back with \(change.to.isEmpty ? "no driver" : change.to): a command that moved it "
                        + "did not end", remedy: "")
            }
        } catch {
            findings.append(
                .warning("drivers", "\(error)", remedy: "flotilla gpu release tries again and says why it can't"))
        }
        do {
            if let change = try vgpus.exclusively({ try vgpus.settleInstances() }) {
                findings.append(.make(.note, "MIG", change, remedy: ""))
            }
        } catch { findings.append(.warning("MIG", "\(error)", remedy: "flotilla gpu restore tries again")) }
        let defined = Set(domains.map(\.migration))
        try vgpus.note(libvirt, ofMigrations: defined)
        let named = Set(domains.flatMap(\.resources).map(\.key))
        let reaped = try vgpus.reap(besides: named) { owner in
            try owner.libvirt == libvirt && !defined.contains(owner.migration)
                && !underWay.contains(owner.migration) && !ledger.isKeptByAnother(owner)
        }
        findings += reaped.left
        findings += reaped.destroyed.map { record in
            .make(
                .note, record.function,
                "the vGPU \(record.profile) on \(record.function) was made for \(record.owner), which is not there: "
                    + "destroyed", remedy: "")
        }
        return try findings
            + ledger.reconcile(
                libvirt: libvirt, domains: domains, underWay: underWay, vgpus: vgpus.records(), sysfs: sysfs)
    }
}
