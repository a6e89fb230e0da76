import FlotillaProtocol
import HostKit
import MigrationModel

/// A GPU's MIG mode, which is never changed but by a person who asks for it: the GPU is reset, and whatever uses it loses it.
///
/// Source: NVIDIA's MIG user guide, "Enable MIG Mode".
extension VgpuHost {
    /// - Parameter tree: as it is now.
    /// - Throws: `failedPrecondition` while it is in use: nothing was changed; `internal` when nvidia-smi fails, or the mode
    ///   is only pending after.
    package func setMIG(_ isOn: Bool, of gpu: PciAddress, in tree: DeviceTree) throws {
        try exclusively {
            guard let step = try switchingMIG(isOn, of: gpu, in: tree) else { return }
            try carryOut(step, hint: "not every GPU has MIG; see journalctl -k | grep -i nvidia")
            guard tools.migModes()?[gpu] == (isOn ? "enabled" : "disabled") else {
                throw MigrationError(
                    .internal,
                    "the MIG mode of \(gpu) is to be \(isOn ? "on" : "off"), and still is not: something uses the GPU, so that it "
                        + "could not be reset",
                    hint:
                        "stop what uses it (nvidia-smi -q -i \(gpu); monitoring too) and reset it (nvidia-smi -i \(gpu) "
                        + "--gpu-reset), or reboot; flotilla gpu profiles --\(isOn ? "disable" : "enable")-mig \(gpu) takes it back"
                )
            }
        }
    }

    package func plan(mig isOn: Bool, of gpu: PciAddress, in tree: DeviceTree) throws -> Plan {
        let step = try switchingMIG(isOn, of: gpu, in: tree)
        return Plan(
            steps: [step].compactMap(\.self),
            notes: step == nil ? [] : ["the driver resets \(gpu), when nothing uses it"])
    }

    /// Nil when it is so already.
    private func switchingMIG(_ isOn: Bool, of gpu: PciAddress, in tree: DeviceTree) throws -> HostStep? {
        if try mig(of: gpu) == isOn { return nil }
        let functions = ([gpu] + (tree[gpu]?.virtualFunctions ?? [])).compactMap { tree[$0] }
        // Whether processes keep it from being reset the driver knows: some of its own always run.
        let kinds: [DeviceUse.Kind] = [.domain, .reservation, .vfio, .vgpu]
        let uses = functions.flatMap { function in
            function.uses.filter { kinds.contains($0.kind) }.map {
                "\(function.function.address) is in use by \($0.by)"
            }
        }
        let vgpus = places().filter { $0.physical == gpu && !$0.isEmpty }.map { "\($0.function) has a vGPU" }
        let parts = isOn ? [] : try instances(of: gpu).all().map { "it is cut into \($0.name) at \($0.start)" }
        let obstacles = uses + vgpus + parts
        guard obstacles.isEmpty else {
            throw MigrationError(
                .failedPrecondition, "the MIG mode of \(gpu) can't be changed: \(obstacles.joined(separator: "; "))",
                hint: "undeploy or destroy what uses it"
                    + (parts.isEmpty ? "" : "; nvidia-smi mig -i \(gpu) -dci and -dgi destroy instances"))
        }
        return .run(["nvidia-smi", "-i", "\(gpu)", "-mig", isOn ? "1" : "0"])
    }

    private func mig(of gpu: PciAddress) throws -> Bool {
        guard let mode = tools.migModes()?[gpu] else {
            throw MigrationError(
                .failedPrecondition, "nvidia-smi tells of no MIG mode of \(gpu)",
                hint: "it takes a GPU with MIG and NVIDIA's driver; flotilla gpu list says what is there")
        }
        return mode == "enabled"
    }
}
