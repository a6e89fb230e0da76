import FlotillaProtocol
import HostKit
import MigrationModel

/// What is done to the host, as values: carried out by `VgpuHost+Steps`, told by dry runs.
extension VgpuHost {
    func carryOut(_ step: HostStep, hint: String = "") throws {
        switch step {
        case .write(let write): try kernel.write(write.text, to: write.attribute)
        case .run(let command): try tools.run(command[0], Array(command.dropFirst()), hint: hint)
        }
    }

    /// Nil when it has none, or some are on.
    func enabling(_ gpu: PciAddress) -> HostStep? {
        let folder = "bus/pci/devices/\(gpu)"
        guard let total = sysfs.number("\(folder)/sriov_totalvfs"), total > 0, virtualFunctions(of: gpu).isEmpty else {
            return nil
        }
        return switching(gpu, flag: "-e", count: total)
    }

    /// Nil when none is on. Throws `failedPrecondition` while one is in use.
    func disabling(_ gpu: PciAddress, in tree: DeviceTree) throws -> HostStep? {
        try refuse(
            (tree[gpu]?.virtualFunctions ?? []).compactMap { tree[$0] }.flatMap { function in
                useObstacles(of: function, consent: [], owner: nil)
            })
        return virtualFunctions(of: gpu).isEmpty ? nil : switching(gpu, flag: "-d", count: 0)
    }

    private func switching(_ gpu: PciAddress, flag: String, count: Int64) -> HostStep {
        let folder = "bus/pci/devices/\(gpu)"
        return sysfs.number("\(folder)/vendor") == 0x10de
            ? .run(["sriov-manage", flag, "\(gpu)"]) : .write("\(count)", to: "\(folder)/sriov_numvfs")
    }

    func record(
        of type: VgpuType, at place: VgpuPlace, for owner: GPUOwner, device: String, _ parameters: [String]
    ) -> VgpuRecord {
        VgpuRecord(
            owner: owner, device: device, function: "\(place.function)", physical: "\(place.physical)",
            path: place.path, typeID: type.id, profile: type.name,
            uuid: place.path == .mdev ? mdevUUID(owner, device) : nil, parameters: parameters)
    }

    func making(_ record: VgpuRecord, type: String, at place: VgpuPlace) -> HostStep {
        switch place.path {
        case .mdev: .write(record.uuid ?? "", to: "\(place.folder)/mdev_supported_types/\(type)/create")
        case .vendor: .write(type, to: "\(place.folder)/nvidia/current_vgpu_type")
        }
    }

    func parameters(of record: VgpuRecord) -> HostStep? {
        guard !record.parameters.isEmpty else { return nil }
        let folder = record.uuid.map { "bus/mdev/devices/\($0)" } ?? "bus/pci/devices/\(record.function)"
        return .write(record.parameters.joined(separator: ","), to: "\(folder)/nvidia/vgpu_params")
    }

    /// Nil when `flotilla gpu restore` makes it at boot: mdevctl is not there, or does not keep it, as those on a MIG
    /// instance, which is gone by then, and on a GPU whose mixed sizes have to be set first.
    func persisting(_ record: VgpuRecord) throws -> HostStep? {
        guard let uuid = record.uuid, VgpuProfile(record.profile).gpuInstance == nil, tools.find("mdevctl") != nil,
            try !store.mixedSizes().contains(record.physical)
        else { return nil }
        return .run(["mdevctl", "define", "--auto", "--uuid", uuid])
    }

    /// The kernel asks a VM to let go of a mediated device, and waits for that without an end.
    func requireUnused(_ record: VgpuRecord) throws {
        guard exists(record) else { return }
        let folder = record.uuid.map { "bus/mdev/devices/\($0)" } ?? "bus/pci/devices/\(record.function)"
        guard let user = DeviceHolders(proc: proc).vfioUser(of: folder, sysfs: sysfs) else { return }
        throw MigrationError(
            .failedPrecondition, "the vGPU \(record.profile) on \(record.function) is in use by \(user)",
            hint: "stop the domain that uses it")
    }

    func removing(_ record: VgpuRecord) -> HostStep {
        guard let uuid = record.uuid else {
            return .write("0", to: "bus/pci/devices/\(record.function)/nvidia/current_vgpu_type")
        }
        return .write("1", to: "bus/mdev/devices/\(uuid)/remove")
    }

    /// Nil where mdevctl never heard of it, or is gone: then nothing makes it again.
    func forgetting(_ record: VgpuRecord) -> HostStep? {
        guard record.isInMdevctl, let uuid = record.uuid, tools.find("mdevctl") != nil else { return nil }
        return .run(["mdevctl", "undefine", "--uuid", uuid])
    }
}

/// Dry runs. They take no lock and change nothing; each throws what the run itself would refuse with.
extension VgpuHost {
    /// What would be done, in order, and what is not known before that.
    package struct Plan: Sendable {
        package var steps: [HostStep] = []
        package var notes: [String] = []
    }

    package func plan(enable gpu: PciAddress) -> Plan { Plan(steps: [enabling(gpu)].compactMap(\.self)) }

    package func plan(disable gpu: PciAddress, in tree: DeviceTree) throws -> Plan {
        Plan(steps: [try disabling(gpu, in: tree)].compactMap(\.self))
    }

    package func plan(mixSizes isMixed: Bool, on gpu: PciAddress) throws -> Plan {
        Plan(steps: [enabling(gpu), try switchingSizes(isMixed, on: gpu)].compactMap(\.self))
    }

    package func plan(
        create profile: VgpuProfile, for owner: GPUOwner, device: String, on gpu: PciAddress? = nil,
        besides others: Set<PciAddress> = [], parameters: [String] = []
    ) throws -> Plan {
        if let gpu { try requireGPU(gpu) }
        var plan = try planOfChange(profile.gpuInstance != nil)
        if let known = try store.read().first(where: { $0.owner.isSame(as: owner) && $0.device == device }) {
            try requireSame(known, profile, on: gpu)
            if isWanted(known, profile, parameters) {
                return isWhole(known) ? plan : Plan(steps: try completion(of: known))
            }
            plan.steps += try removal(of: known)
        }
        if let step = gpu.flatMap(enabling) {
            plan.steps.append(step)
            plan.notes.append("then a \(profile) on the first virtual function that offers it: they are not there yet")
            return plan
        }
        var failure: MigrationError?
        for place in candidates(for: profile, on: gpu, besides: others) {
            guard let type = place.type(of: profile) else { continue }
            let record = record(of: type, at: place, for: owner, device: device, parameters)
            do {
                if let resource = record.resource { try ledger.requireFree(resource, for: owner) }
            } catch let error as MigrationError {
                failure = failure ?? error
                continue
            }
            let steps = [try preparingSizes(of: place), making(record, type: type.id, at: place)]
            plan.steps += try steps.compactMap(\.self) + completion(of: record)
            return plan
        }
        guard profile.gpuInstance != nil else { throw try failure ?? noRoom(for: profile, on: gpu) }
        plan.steps.append(try adding(for: profile, on: gpu, besides: others))
        plan.notes.append("then a \(profile) on the first virtual function that offers it")
        plan.notes.append("without room for the instance, those of a GPU without vGPUs are made again in other orders")
        return plan
    }

    package func plan(destroy records: [VgpuRecord]) throws -> Plan { Plan(steps: try records.flatMap(removal)) }

    package func restorePlan() throws -> Plan {
        var plan = try planOfChange(true)
        var restored: [PciAddress: [VgpuProfile]] = [:]
        var layouts: [PciAddress: Mig] = [:]
        for record in try store.read() {
            if exists(record) {
                if record.phase == .present, !isWhole(record) { plan.steps += try completion(of: record) }
                continue
            }
            guard record.phase == .present else {
                plan.steps += try removal(of: record)
                continue
            }
            let step = record.physical == record.function ? nil : PciAddress(record.physical).flatMap(enabling)
            if let step, !plan.steps.contains(step) { plan.steps.append(step) }
            let profile = VgpuProfile(record.profile)
            if profile.gpuInstance != nil, let gpu = PciAddress(record.physical),
                place(of: record)?.type(of: profile) == nil
            {
                let alike = restored[gpu, default: []].count { $0 == profile }
                restored[gpu, default: []].append(profile)
                var layout = try layouts[gpu] ?? instances(of: gpu).layout()
                if alike % Int(layout.home(of: profile)?.share ?? 1) == 0 {
                    plan.steps.append(try addingInstance(for: profile, on: gpu, in: &layout, again: record))
                }
                layouts[gpu] = layout
            }
            if let place = place(of: record), let type = place.type(of: VgpuProfile(record.profile)) {
                let sizes = try preparingSizes(of: place).flatMap { plan.steps.contains($0) ? nil : $0 }
                plan.steps += [sizes, making(record, type: type.id, at: place)].compactMap(\.self)
                plan.steps += try completion(of: record)
            } else {
                if let type = place(of: record)?.currentType {
                    throw MigrationError(
                        .failedPrecondition,
                        "\(record.function) has a vGPU of type \(type), and is to be a \(record.profile) for \(record.owner)",
                        hint: "destroy that one, then run flotilla gpu restore")
                }
                if let gpu = PciAddress(record.physical), try store.mixedSizes().contains(record.physical) {
                    let sizes = try switchingSizes(true, on: gpu)
                    if !plan.steps.contains(sizes) { plan.steps.append(sizes) }
                }
                plan.notes.append("then \(record.profile) on \(record.function) for \(record.owner)")
            }
        }
        return plan
    }

    /// Tells of what a command that was killed began: that is taken back before.
    private func planOfChange(_ isSettled: Bool) throws -> Plan {
        guard isSettled, let change = try migs.read().change, change.boot == boot else { return Plan() }
        return Plan(notes: ["before that the GPU instances of \(change.gpu) are put back: a change of them did not end"]
        )
    }

    private func completion(of record: VgpuRecord) throws -> [HostStep] {
        try [parameters(of: record), record.phase == .present ? nil : persisting(record)].compactMap(\.self)
    }

    private func removal(of record: VgpuRecord) throws -> [HostStep] {
        try requireUnused(record)
        return try (exists(record) ? [removing(record)] : []) + [forgetting(record)].compactMap(\.self)
            + removingInstance(of: record)
    }

    /// On the first GPU that has room for one.
    private func adding(
        for profile: VgpuProfile, on gpu: PciAddress?, besides others: Set<PciAddress> = []
    ) throws -> HostStep {
        var failures: [MigrationError] = []
        for card in partitionable(on: gpu, besides: others) {
            do {
                var layout = try instances(of: card).layout()
                return try addingInstance(for: profile, on: card, in: &layout)
            } catch let error as MigrationError {
                failures.append(error)
            }
        }
        throw try noRoom(for: profile, on: gpu, failures)
    }

    /// As a person reads it.
    package func text(of step: HostStep) -> String {
        switch step {
        case .write(let write): write.told(of: sysfs)
        case .run(let command):
            "would run: " + ([tools.find(command[0]) ?? command[0]] + command.dropFirst()).joined(separator: " ")
        }
    }
}

/// The same for every attempt (RFC 9562 version 8), so that a repeated one finds what a crashed one made.
private func mdevUUID(_ owner: GPUOwner, _ device: String) -> String {
    let seed = "flotilla vgpu \(owner.migration.isEmpty ? owner.domain : owner.migration) \(device)"
    var bytes = Array(Digest.hash(.sha256, Array(seed.utf8)).prefix(16))
    bytes[6] = bytes[6] & 0x0f | 0x80
    bytes[8] = bytes[8] & 0x3f | 0x80
    let text = Array(hex(bytes))
    return [0..<8, 8..<12, 12..<16, 16..<20, 20..<32].map { String(text[$0]) }.joined(separator: "-")
}
