import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf

/// GPU instances for MIG-backed vGPUs. Made when a vGPU needs one and none is free, destroyed with it; those that others made
/// are left alone, but for rearranging a GPU that nothing uses.
extension VgpuHost {
    func instances(of gpu: PciAddress) -> MIGInstances { MIGInstances(tools: tools, gpu: gpu) }

    /// GPUs on which an instance could be made, those with vGPUs first. Without an answer of nvidia-smi none is left out.
    func partitionable(on gpu: PciAddress?, besides others: Set<PciAddress> = []) -> [PciAddress] {
        let modes = tools.migModes() ?? [:]
        let all = places().filter { (gpu == nil || $0.physical == gpu) && modes[$0.physical] != "disabled" }
        let used = Set(all.filter { !$0.isEmpty }.map(\.physical))
        let free = Set(all.filter { !$0.isOccupied && !$0.isPart(of: others) }.map(\.physical)).sorted()
        return free.filter(used.contains) + free.filter { !used.contains($0) }
    }

    /// Makes an instance that such a vGPU needs for the owner's device, beside those there are. With `rearranging` all are
    /// made again in other places, which takes a GPU whose instances nothing uses: where one lies depends on the order in
    /// which they were made, so that a GPU with enough left may have no room.
    ///
    /// - Throws: `resourceExhausted`; the instances are as they were.
    func addInstance(
        for vgpu: VgpuProfile, on gpu: PciAddress, for owner: GPUOwner, device: String, rearranging: Bool = false
    ) throws {
        let card = instances(of: gpu)
        let layout = try card.layout()
        let profile = try instance(for: vgpu, in: layout, of: gpu)
        let name = profile.name
        var change = MIGRecords.Change(
            gpu: "\(gpu)", boot: boot, name: name, start: nil, before: layout.instances.map(MIGRecords.Instance.init),
            isRearranging: rearranging)
        if !rearranging {
            guard profile.starts.isEmpty || layout.hasRoom(for: name) else { throw full(name, gpu, layout) }
            change.start = try earlierStart(owner, device, gpu, layout, profile) ?? layout.start(for: name)
            let wanted = MigInstance.with { ($0.name, $0.start) = (name, change.start ?? 0) }
            return try carryOut(change, for: owner, device) {
                do {
                    try change.start == nil
                        ? card.create([(profile, nil)]) : card.create([wanted], by: layout)
                } catch let error as MigrationError { throw full(name, gpu, layout, error) }
            }
        }
        let names = layout.instances.map(\.name) + [name]
        let packing = layout.packing(of: names)
        guard !layout.instances.isEmpty, names.count <= 7, packing != nil || profile.starts.isEmpty else {
            throw full(name, gpu, layout)
        }
        let isOurs = try migs.read().made.contains { $0.gpu == "\(gpu)" && $0.boot == boot }
        let isUsed = places().contains { $0.physical == gpu && !$0.isEmpty }
        if isOurs || isUsed { throw full(name, gpu, layout) }
        if let obstacle = try card.obstacleToMoving() {
            throw MigrationError(
                .resourceExhausted, "\(gpu) has room for a GPU instance \(name) only in other places, and \(obstacle)",
                hint: "end what uses it, or choose another GPU")
        }
        change.start = packing?.last?.start
        try carryOut(change, for: owner, device) {
            try card.destroy(layout.instances)
            // The driver's own choice of places depends on the order; a minute is enough for the likeliest.
            let orders = orderings(names).prefix(60).map { order in
                order.compactMap { name in layout.profile(name).map { ($0, UInt32?.none) } }
            }
            let placed =
                packing.map { [$0.compactMap { one in layout.profile(one.name).map { ($0, one.start) } }] } ?? []
            for attempt in placed + orders {
                do { return try card.create(attempt) } catch { try card.destroy(card.all()) }
            }
            throw full(name, gpu, layout)
        }
    }

    /// What `addInstance` does where there is room; `layout` has it then.
    ///
    /// - Parameter record: the vGPU that is to be made again.
    func addingInstance(
        for vgpu: VgpuProfile, on gpu: PciAddress, in layout: inout Mig, again record: VgpuRecord? = nil
    ) throws -> HostStep {
        let profile = try instance(for: vgpu, in: layout, of: gpu)
        guard layout.hasRoom(for: profile.name) else { throw full(profile.name, gpu, layout) }
        let earlier = try record.flatMap { try earlierStart($0.owner, $0.device, gpu, layout, profile) }
        let start = earlier ?? layout.start(for: profile.name)
        layout.add(profile.name, at: start)
        return .run(instances(of: gpu).creating([(profile, start)]))
    }

    /// Destroys the instance that was made for this vGPU, which is gone. One that another vGPU of flotilla's got meanwhile
    /// goes with that, and where several share one, with the last that may be on it. What only others' may be on stays.
    ///
    /// - Parameter isNew: no vGPU was ever on it.
    func removeInstance(of owner: GPUOwner, device: String, isNew: Bool = false) throws {
        for made in try migs.read().made where made.isFor(owner, device) {
            let gpu = try isThere(made)
            if let gpu, try !isNew && mayBeShared(made, on: gpu) {
                let heir = try heir(of: made, isShared: true)
                try migs.update { book in
                    guard let index = book.made.firstIndex(where: made.isSame) else { return }
                    if let heir {
                        (book.made[index].owner, book.made[index].device) = (heir.owner, heir.device)
                    } else {
                        book.made.remove(at: index)
                    }
                }
                continue
            }
            do {
                if let gpu { try instances(of: gpu).destroy([made.instance.message]) }
                Failpoint.gpuMigDone.hit()
                try migs.update { $0.made.removeAll(where: made.isSame) }
            } catch {
                guard let heir = try heir(of: made) else {
                    throw MigrationError(
                        .failedPrecondition,
                        "the GPU instance \(made.instance.name) (\(made.instance.id)) of \(made.gpu) is still there: \(error)",
                        hint: "end what uses it, and try again")
                }
                try migs.update { book in
                    for index in book.made.indices where made.isSame(book.made[index]) {
                        (book.made[index].owner, book.made[index].device) = (heir.owner, heir.device)
                    }
                }
            }
        }
    }

    /// Made by an attempt that did not come to its vGPU.
    func instancesWithoutVgpu() throws -> [MIGRecords.Made] {
        let records = try store.read()
        return try migs.read().made.filter { made in !records.contains { made.isFor($0.owner, $0.device) } }
    }

    func removingInstance(of record: VgpuRecord) throws -> [HostStep] {
        try migs.read().made.filter { $0.isFor(record.owner, record.device) }.flatMap { made -> [HostStep] in
            guard let gpu = try isThere(made), try !mayBeShared(made, on: gpu, besides: record) else { return [] }
            return instances(of: gpu).destroying(made.instance.id).map(HostStep.run)
        }
    }

    /// Goes back to what was there before a change that a crash ended. Call before anything else is done with instances.
    ///
    /// - Returns: what was put right, for the log.
    @discardableResult
    func settleInstances() throws -> String? {
        guard let change = try migs.read().change else { return nil }
        // A reboot took them all.
        if change.boot == boot { try putBack(change) }
        try migs.update { $0.change = nil }
        return "the GPU instances of \(change.gpu) are as they were: a command that added a \(change.name) did not end"
    }

    private func carryOut(
        _ change: MIGRecords.Change, for owner: GPUOwner, _ device: String, _ body: () throws -> Void
    ) throws {
        if let unfinished = try migs.read().change {
            throw MigrationError(
                .failedPrecondition,
                "the GPU instances of \(unfinished.gpu) are to be put back first: a change of them did not end",
                hint: "end what uses them, then flotilla gpu restore; or see to them by hand and remove \(migs.path)")
        }
        try migs.update { $0.change = change }
        Failpoint.gpuMigJournaled.hit()
        do {
            try body()
            let made = try added(by: change)
            Failpoint.gpuMigDone.hit()
            try migs.update { book in
                book.change = nil
                book.made.removeAll { $0.isFor(owner, device) }
                book.made.append(
                    MIGRecords.Made(
                        gpu: change.gpu, instance: made, owner: owner, device: device, boot: boot))
            }
        } catch {
            try putBack(change, after: error)
            try migs.update { $0.change = nil }
            throw error
        }
    }

    private func added(by change: MIGRecords.Change) throws -> MIGRecords.Instance {
        let now = try PciAddress(change.gpu).map { try instances(of: $0).all() } ?? []
        let new = now.map(MIGRecords.Instance.init).filter { instance in
            instance.name == change.name && !(change.before.contains(instance) && !change.isRearranging)
        }
        guard let made = new.first(where: { $0.start == change.start }) ?? new.first else {
            throw MigrationError(
                .internal, "\(change.gpu) has no new GPU instance \(change.name), although nvidia-smi made it")
        }
        return made
    }

    private func putBack(_ change: MIGRecords.Change, after failure: (any Error)? = nil) throws {
        do { try undo(change) } catch {
            let before = change.before.map { "\($0.name) at \($0.start)" }.joined(separator: ", ")
            throw MigrationError(
                .failedPrecondition,
                (failure.map { "\($0); and " } ?? "")
                    + "the GPU instances of \(change.gpu) can't be put back as they were "
                    + "(\(before.isEmpty ? "none" : before)): \(error)",
                hint: "end what uses them, then flotilla gpu restore; or see to them by hand and remove \(migs.path)")
        }
    }

    /// - Throws: when something uses what has to go, or nvidia-smi does not answer: call it again.
    private func undo(_ change: MIGRecords.Change) throws {
        guard let gpu = PciAddress(change.gpu) else { return }
        let card = instances(of: gpu)
        let there = try card.all()
        func isSame(_ a: MigInstance, _ b: MIGRecords.Instance) -> Bool { a.name == b.name && a.start == b.start }
        let names = change.isRearranging ? change.before.map(\.name) + [change.name] : [change.name]
        var extra = there.filter { one in
            names.contains(one.name) && !change.before.contains { isSame(one, $0) }
        }
        if !change.isRearranging, extra.count > 1 {
            // Somebody else made some since.
            extra = extra.filter { $0.start == change.start }
        }
        let missing = change.before.filter { one in !there.contains { isSame($0, one) } }
        try card.destroy(extra)
        guard !missing.isEmpty else { return }
        try card.create(missing.sorted { $0.start < $1.start }.map(\.message), by: card.layout())
    }

    /// The GPU, while the instance is as it was made.
    private func isThere(_ made: MIGRecords.Made) throws -> PciAddress? {
        guard made.boot == boot, let gpu = PciAddress(made.gpu) else { return nil }
        return try instances(of: gpu).all().map(MIGRecords.Instance.init).contains(made.instance) ? gpu : nil
    }

    /// A vGPU other than that one is or may be on it: not every driver tells, and it may take the instance from a vGPU whose VM
    /// is off.
    private func mayBeShared(
        _ made: MIGRecords.Made, on gpu: PciAddress, besides leaving: VgpuRecord? = nil
    ) throws -> Bool {
        let layout = try instances(of: gpu).layout()
        let (records, types) = (try store.read(), tools.supportedTypes(of: gpu))
        let there = places().filter { $0.physical == gpu && !isElsewhere($0, than: made, in: layout) }
            .flatMap { place -> [VgpuProfile?] in
                var profiles = place.profiles(records, types)
                if let leaving, leaving.function == "\(place.function)", !profiles.isEmpty { profiles.removeFirst() }
                return profiles.map { $0.isEmpty ? nil : VgpuProfile($0) }
            }
        return layout.mayShare(made.instance.name, with: there)
    }

    /// The driver says that the vGPU of this function is on another instance of the kind.
    private func isElsewhere(_ place: VgpuPlace, than made: MIGRecords.Made, in layout: Mig) -> Bool {
        guard let id = place.gpuInstance, id != made.instance.id else { return false }
        return layout.instances.contains { $0.id == id && $0.name == made.instance.name }
    }

    /// - Parameter isShared: another that was made for it already is no reason against it.
    private func heir(of made: MIGRecords.Made, isShared: Bool = false) throws -> VgpuRecord? {
        guard let gpu = PciAddress(made.gpu) else { return nil }
        let layout = try instances(of: gpu).layout()
        let owned = try migs.read().made
        return try store.read().first { record in
            record.physical == made.gpu && layout.home(of: VgpuProfile(record.profile))?.name == made.instance.name
                && !made.isFor(record.owner, record.device) && exists(record)
                && !(place(of: record).map { isElsewhere($0, than: made, in: layout) } ?? false)
                && (isShared
                    || !owned.contains { $0.gpu == made.gpu && $0.isFor(record.owner, record.device) })
        }
    }

    /// Where the instance of this vGPU was before a reboot: with all in their places again, all fit.
    private func earlierStart(
        _ owner: GPUOwner, _ device: String, _ gpu: PciAddress, _ layout: Mig, _ profile: MigProfile
    ) throws -> UInt32? {
        let made = try migs.read().made.first { $0.isFor(owner, device) && $0.gpu == "\(gpu)" }
        guard let start = made?.instance.start, made?.instance.name == profile.name, profile.starts.contains(start),
            !layout.instances.contains(where: { $0.start < start + profile.size && start < $0.start + $0.size })
        else { return nil }
        return start
    }

    private func instance(for vgpu: VgpuProfile, in layout: Mig, of gpu: PciAddress) throws -> MigProfile {
        guard let profile = layout.home(of: vgpu).flatMap({ layout.profile($0.name) }) else {
            let (found, remedy) = missingHome(of: vgpu, layout, "\(gpu)")
            throw MigrationError(.failedPrecondition, found, hint: remedy)
        }
        return profile
    }

    private func full(
        _ name: String, _ gpu: PciAddress, _ layout: Mig, _ cause: MigrationError? = nil
    ) -> MigrationError {
        let there = layout.instances.map { "\($0.name) at \($0.start)" }.joined(separator: ", ")
        return MigrationError(
            .resourceExhausted,
            "\(gpu) has no room for a GPU instance \(name)" + (there.isEmpty ? "" : " beside \(there)")
                + (cause.map { ": \($0.message)" } ?? ""), hint: "destroy vGPUs on it, or choose another GPU")
    }
}
