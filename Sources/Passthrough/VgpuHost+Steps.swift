import FlotillaProtocol
import HostKit
import MigrationModel

extension VgpuHost {
    /// Turns the GPU's virtual functions on: NVIDIA's by its own program, which also prepares the driver, others' through
    /// `sriov_numvfs`. A GPU without any, or with some on, is left alone.
    package func enableVirtualFunctions(of gpu: PciAddress) throws {
        guard let step = enabling(gpu) else { return }
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

    /// Lets vGPUs of several frame-buffer sizes live on one GPU. Only while there is none: after the virtual functions are
    /// on, before the first type is written.
    package func allowMixedSizes(on gpu: PciAddress) throws {
        try exclusively {
            try enableVirtualFunctions(of: gpu)
            try carryOut(mixingSizes(on: gpu), hint: "not every GPU can mix sizes")
        }
    }

    package func virtualFunctions(of gpu: PciAddress) -> [String] {
        sysfs.list("bus/pci/devices/\(gpu)").filter { $0.hasPrefix("virtfn") }
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
            record.isInMdevctl = try persist(record)
            record.phase = .present
            try store.put(record)
            return record
        } catch {
            // What can't be taken back now keeps its record, for the next attempt or `gpu destroy`.
            try? remove(record, as: owner)
            throw error
        }
    }

    /// Asks the kernel, reads back, then sets parameters.
    func write(_ record: VgpuRecord, type: String, at place: VgpuPlace) throws {
        if let current = place.currentType {
            throw MigrationError(
                .resourceExhausted, "\(place.function) has a vGPU of type \(current)", hint: "destroy it first")
        }
        try carryOut(making(record, type: type, at: place))
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
        if let step = parameters(of: record) { try carryOut(step) }
    }

    /// True when mdevctl will make it at boot.
    private func persist(_ record: VgpuRecord) throws -> Bool {
        guard let step = persisting(record) else { return false }
        try carryOut(step, hint: "see mdevctl(8)")
        return true
    }

    func remove(_ record: VgpuRecord, as owner: GPUOwner) throws {
        var leaving = record
        leaving.phase = .destroying
        try store.put(leaving)
        if exists(record) {
            try carryOut(removing(record))
            guard !exists(record) else {
                throw MigrationError(
                    .failedPrecondition, "the vGPU \(record.profile) on \(record.function) is still there",
                    hint: "stop the domain that uses it")
            }
        }
        Failpoint.gpuVgpuDestroyed.hit()
        if let step = forgetting(record) { try? carryOut(step) }
        if let resource = record.resource { try ledger.forget([resource], of: owner) }
        try store.remove(record)
    }
}
