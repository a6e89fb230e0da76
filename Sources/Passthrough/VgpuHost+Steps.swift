import FlotillaProtocol
import HostKit
import MigrationModel

extension VgpuHost {
    /// Turns the GPU's virtual functions on: NVIDIA's by its own program, which also prepares the driver, others' through
    /// `sriov_numvfs`. A GPU without any, or with some on, is left alone.
    package func enableVirtualFunctions(of gpu: PciAddress) throws {
        let folder = "bus/pci/devices/\(gpu)"
        guard let total = sysfs.number("\(folder)/sriov_totalvfs"), total > 0, virtualFunctions(of: gpu).isEmpty else {
            return
        }
        if sysfs.number("\(folder)/vendor") == 0x10de {
            try tools.run("sriov-manage", ["-e", "\(gpu)"], hint: "install NVIDIA's vGPU host driver")
        } else {
            try kernel.write("\(total)\n", to: "\(folder)/sriov_numvfs")
        }
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
        try refuse(
            (tree[gpu]?.virtualFunctions ?? []).compactMap { tree[$0] }.flatMap { function in
                useObstacles(of: function, consent: [], owner: nil)
            })
        let folder = "bus/pci/devices/\(gpu)"
        guard !virtualFunctions(of: gpu).isEmpty else { return }
        if sysfs.number("\(folder)/vendor") == 0x10de {
            try tools.run("sriov-manage", ["-d", "\(gpu)"], hint: "install NVIDIA's vGPU host driver")
        } else {
            try kernel.write("0\n", to: "\(folder)/sriov_numvfs")
        }
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
            let used = places().filter { $0.physical == gpu && (!$0.mediatedDevices.isEmpty || $0.currentType != nil) }
            guard used.isEmpty else {
                throw MigrationError(
                    .failedPrecondition,
                    "\(gpu) has vGPUs (on \(used.map { "\($0.function)" }.joined(separator: ", ")))",
                    hint: "destroy them first: sizes can be mixed only from the first vGPU on")
            }
            try tools.run("nvidia-smi", ["vgpu", "-i", "\(gpu)", "-shm", "1"], hint: "not every GPU can mix sizes")
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
        var record = VgpuRecord(
            owner: owner, device: device, function: "\(place.function)", physical: "\(place.physical)",
            path: place.path, typeID: type.id, profile: type.name, parameters: parameters)
        if place.path == .mdev { record.uuid = mdevUUID(owner, device) }
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
        let parameters: String
        switch place.path {
        case .mdev:
            let uuid = record.uuid ?? ""
            parameters = "bus/mdev/devices/\(uuid)/nvidia/vgpu_params"
            try kernel.write("\(uuid)\n", to: "\(place.folder)/mdev_supported_types/\(type)/create")
            guard sysfs.exists("bus/mdev/devices/\(uuid)") else {
                throw MigrationError(.internal, "the kernel did not make a \(record.profile) on \(place.function)")
            }
        case .vendor:
            parameters = "\(place.folder)/nvidia/vgpu_params"
            if let current = place.currentType {
                throw MigrationError(
                    .resourceExhausted, "\(place.function) has a vGPU of type \(current)", hint: "destroy it first")
            }
            try kernel.write("\(type)\n", to: "\(place.folder)/nvidia/current_vgpu_type")
            guard place.currentType == type else {
                throw MigrationError(
                    .internal,
                    "\(place.function) did not become a \(record.profile): it reads \(place.currentType ?? "0")",
                    hint: "the kernel's log says why: journalctl -k | grep -i nvidia")
            }
        }
        if !record.parameters.isEmpty {
            try kernel.write("\(record.parameters.joined(separator: ","))\n", to: parameters)
        }
    }

    /// True when mdevctl will make it at boot. It does not keep MIG-backed ones, whose instances are gone by then.
    private func persist(_ record: VgpuRecord) throws -> Bool {
        guard let uuid = record.uuid, VgpuProfile(record.profile).gpuInstance == nil, tools.find("mdevctl") != nil
        else { return false }
        try tools.run("mdevctl", ["define", "--auto", "--uuid", uuid], hint: "see mdevctl(8)")
        return true
    }

    func remove(_ record: VgpuRecord, as owner: GPUOwner) throws {
        var leaving = record
        leaving.phase = .destroying
        try store.put(leaving)
        if exists(record) {
            if let uuid = record.uuid {
                try kernel.write("1\n", to: "bus/mdev/devices/\(uuid)/remove")
            } else {
                try kernel.write("0\n", to: "bus/pci/devices/\(record.function)/nvidia/current_vgpu_type")
            }
            guard !exists(record) else {
                throw MigrationError(
                    .failedPrecondition, "the vGPU \(record.profile) on \(record.function) is still there",
                    hint: "stop the domain that uses it")
            }
        }
        Failpoint.gpuVgpuDestroyed.hit()
        if record.isInMdevctl, let uuid = record.uuid {
            _ = try? tools.run("mdevctl", ["undefine", "--uuid", uuid], hint: "")
        }
        if let resource = record.resource { try ledger.forget([resource], of: owner) }
        try store.remove(record)
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
