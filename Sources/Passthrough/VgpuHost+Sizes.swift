import FlotillaProtocol
import MigrationModel

/// vGPUs of several frame-buffer sizes on one GPU. Its driver forgets that mode with every reboot and takes it only while
/// the GPU has no vGPU, so it is set before the first one, every time.
///
/// Source: NVIDIA's vGPU user guide, "Configuring a GPU for Mixed-Size Mode".
extension VgpuHost {
    /// Lets vGPUs of several sizes live on this GPU from now on, or of one size only. Only while it has none.
    ///
    /// - Throws: `failedPrecondition` while it has vGPUs, `internal` when the GPU can't: the mode is as it was.
    package func setMixedSizes(_ isMixed: Bool, on gpu: PciAddress) throws {
        try exclusively {
            let step = try switchingSizes(isMixed, on: gpu)
            try enableVirtualFunctions(of: gpu)
            let before = try store.mixedSizes().contains("\(gpu)")
            if isMixed { try store.setMixedSizes(true, of: gpu) }
            do { try carryOut(step, hint: "not every GPU can mix sizes") } catch {
                try store.setMixedSizes(before, of: gpu)
                throw error
            }
            if !isMixed { try store.setMixedSizes(false, of: gpu) }
        }
    }

    /// Throws `failedPrecondition` when the GPU has vGPUs.
    func switchingSizes(_ isMixed: Bool, on gpu: PciAddress) throws -> HostStep {
        let used = functionsInUse(of: gpu)
        guard used.isEmpty else {
            throw MigrationError(
                .failedPrecondition, "\(gpu) has vGPUs (on \(used.map(\.description).joined(separator: ", ")))",
                hint: "destroy them first: whether sizes can be mixed is decided before the first vGPU")
        }
        return .run(["nvidia-smi", "vgpu", "-i", "\(gpu)", "-shm", isMixed ? "1" : "0"])
    }

    /// What has to be done before the first vGPU of the place's GPU; nil: nothing, or there are some.
    func preparingSizes(of place: VgpuPlace) throws -> HostStep? {
        guard try store.mixedSizes().contains("\(place.physical)"), functionsInUse(of: place.physical).isEmpty else {
            return nil
        }
        return try switchingSizes(true, on: place.physical)
    }

    func prepareSizes(of place: VgpuPlace) throws {
        if let step = try preparingSizes(of: place) {
            try carryOut(step, hint: "flotilla gpu profiles --equal-sizes \(place.physical) goes on without")
        }
    }

    private func functionsInUse(of gpu: PciAddress) -> [PciAddress] {
        places().filter { $0.physical == gpu && (!$0.mediatedDevices.isEmpty || $0.currentType != nil) }
            .map(\.function)
    }
}
