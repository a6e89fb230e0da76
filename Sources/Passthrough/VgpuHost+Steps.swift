import FlotillaProtocol
import HostKit
import MigrationModel

extension VgpuHost {
    /// Turns the GPU's virtual functions on: NVIDIA's by its own program, which also prepares the driver, others' through
    /// `sriov_numvfs`. A GPU without any, or with some on, is left alone.
    package func enableVirtualFunctions(of gpu: PciAddress) throws {
        guard let step = enabling(gpu) else { return try requireOffers(gpu) }
        try carryOut(step, hint: "install NVIDIA's vGPU host driver")
        guard !virtualFunctions(of: gpu).isEmpty else {
            throw MigrationError(
                .internal, "\(gpu) has no virtual functions although they were turned on without an error",
                hint: "enable SR-IOV, the IOMMU and large address decoding in the firmware; see the kernel's log")
        }
    }

    /// Turns them off again.
    ///
    /// - Parameter tree: as it is now.
    /// - Throws: `failedPrecondition` while one of them is in use: nothing was changed.
    package func disableVirtualFunctions(of gpu: PciAddress, in tree: DeviceTree) throws {
        guard let step = try disabling(gpu, in: tree) else { return }
        try carryOut(step, hint: "install NVIDIA's vGPU host driver")
        guard virtualFunctions(of: gpu).isEmpty else {
            throw MigrationError(
                .internal, "\(gpu) still has its virtual functions", hint: "see the kernel's log: journalctl -k")
        }
    }

    package func virtualFunctions(of gpu: PciAddress) -> [String] {
        sysfs.list("bus/pci/devices/\(gpu)").filter { $0.hasPrefix("virtfn") }
    }

    package func totalVirtualFunctions(of gpu: PciAddress) -> Int {
        Int(clamping: sysfs.number("bus/pci/devices/\(gpu)/sriov_totalvfs") ?? 0)
    }

    func place(of record: VgpuRecord) -> VgpuPlace? {
        PciAddress(record.function).flatMap { VgpuPlace($0, sysfs: sysfs) }
    }

    func exists(_ record: VgpuRecord) -> Bool {
        if let uuid = record.uuid { return sysfs.exists("bus/mdev/devices/\(uuid)") }
        return place(of: record)?.currentType == record.typeID
    }

    func make(
        _ type: VgpuType, at place: VgpuPlace, for owner: GPUOwner, device: String, _ parameters: [String]
    ) throws -> VgpuRecord {
        var record = record(of: type, at: place, for: owner, device: device, parameters)
        guard let resource = record.resource else {
            throw MigrationError(.internal, "\(place.function) is not a PCI address")
        }
        try ledger.reserve([resource], for: owner)
        do {
            try store.put(record)
            Failpoint.gpuVgpuRecorded.hit()
            try write(record, type: type.id, at: place)
            Failpoint.gpuVgpuCreated.hit()
            try complete(&record)
            return record
        } catch {
            // What can't be taken back now keeps its record, for the next attempt or `gpu destroy`.
            try? remove(record, as: owner)
            throw error
        }
    }

    /// What is there already is what was asked for, so far as its record says.
    func isWanted(_ known: VgpuRecord, _ profile: VgpuProfile, _ parameters: [String]) -> Bool {
        VgpuProfile(known.profile) == profile && known.parameters == parameters && known.phase != .destroying
            && exists(known)
    }

    /// Nothing is left to do for it in this boot.
    func isWhole(_ record: VgpuRecord) -> Bool {
        record.phase == .present && (record.parameters.isEmpty || record.tunedIn == boot)
    }

    /// Sets the parameters of a vGPU that the kernel has, and has mdevctl keep it: as often as it takes, wherever an
    /// earlier attempt ended.
    func complete(_ record: inout VgpuRecord) throws {
        if let step = parameters(of: record) { try carryOut(step) }
        Failpoint.gpuVgpuTuned.hit()
        record.tunedIn = boot
        if record.phase != .present {
            // Whoever finds the record after a crash undefines it too.
            record.isInMdevctl = try persisting(record) != nil
            try store.put(record)
            try persist(record)
            Failpoint.gpuVgpuKept.hit()
            record.phase = .present
        }
        try store.put(record)
    }

    /// Asks the kernel and reads back.
    func write(_ record: VgpuRecord, type: String, at place: VgpuPlace) throws {
        if let current = place.currentType {
            throw MigrationError(
                .resourceExhausted, "\(place.function) has a vGPU of type \(current)", hint: "destroy it first")
        }
        try prepareSizes(of: place)
        do { try carryOut(making(record, type: type, at: place)) } catch {
            // mdevctl was faster, at boot.
            guard exists(record) else { throw error }
        }
        switch place.path {
        case .mdev:
            guard exists(record) else {
                throw MigrationError(.internal, "the kernel did not make a \(record.profile) on \(place.function)")
            }
        case .vendor:
            guard place.currentType == type else {
                throw MigrationError(
                    .internal,
                    "\(place.function) did not become a \(record.profile): it reads \(place.currentType ?? "0")",
                    hint: "the kernel's log says why: journalctl -k | grep -i nvidia")
            }
        }
    }

    private func persist(_ record: VgpuRecord) throws {
        guard let step = try persisting(record) else { return }
        do { try carryOut(step, hint: "see mdevctl(8)") } catch {
            // An earlier attempt came as far.
            guard (try? keeps(record)) == true else { throw error }
        }
    }

    private func forget(_ record: VgpuRecord) throws {
        guard let step = forgetting(record) else { return }
        do { try carryOut(step, hint: "see mdevctl(8)") } catch {
            // An earlier attempt did it, or died before there was something to do.
            guard (try? keeps(record)) == false else { throw error }
        }
    }

    /// mdevctl makes it again at boot.
    private func keeps(_ record: VgpuRecord) throws -> Bool {
        guard let uuid = record.uuid else { return false }
        let known = try tools.run("mdevctl", ["list", "--defined", "--uuid", uuid], hint: "see mdevctl(8)")
        return known.lowercased().contains(uuid)
    }

    func remove(_ record: VgpuRecord, as owner: GPUOwner) throws {
        try requireUnused(record)
        var leaving = record
        leaving.phase = .destroying
        try store.put(leaving)
        do {
            if exists(record) { try carryOut(removing(record)) }
            guard !exists(record) else {
                throw MigrationError(
                    .failedPrecondition, "the vGPU \(record.profile) on \(record.function) is still there",
                    hint: "stop the domain that uses it")
            }
        } catch {
            // Somebody has it: a reboot must not take it from them.
            try store.put(record)
            throw error
        }
        Failpoint.gpuVgpuDestroyed.hit()
        try forget(record)
        Failpoint.gpuVgpuForgotten.hit()
        try removeInstance(of: record.owner, device: record.device)
        if let resource = record.resource { try ledger.forget([resource], of: owner) }
        try store.remove(record)
    }
}
