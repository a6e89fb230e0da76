import MigrationModel

extension VgpuHost {
    /// What a person may set of a GPU, on or off.
    package enum Setting: Sendable {
        case mig(Bool)
        case virtualFunctions(Bool)
        case mixedSizes(Bool)

        fileprivate var text: String {
            switch self {
            case .mig(let isOn): "MIG mode \(isOn ? "on" : "off")"
            case .virtualFunctions(let isOn): "virtual functions \(isOn ? "on" : "off")"
            case .mixedSizes(let isOn): "mixed sizes \(isOn ? "on" : "off")"
            }
        }
    }

    /// What `set` would do. Throws what it would refuse with.
    package func plan(_ setting: Setting, of gpu: PciAddress, observe: () throws -> DeviceTree) throws -> Plan {
        try require(setting, of: gpu, observe: observe)
        return switch setting {
        case .mig(let isOn): try plan(mig: isOn, of: gpu, in: observe())
        case .virtualFunctions(true): plan(enable: gpu)
        case .virtualFunctions(false): try plan(disable: gpu, in: observe())
        case .mixedSizes(let isOn): try plan(mixSizes: isOn, on: gpu)
        }
    }

    /// Each in its turn, after all were judged.
    ///
    /// - Parameter observe: looks at the host, as it is now.
    /// - Throws: `failedPrecondition` when one is refused: nothing was changed. What fails later says what was done before.
    package func set(
        _ settings: [(gpu: PciAddress, setting: Setting)], observe: () throws -> DeviceTree
    ) throws {
        for (gpu, setting) in settings { _ = try plan(setting, of: gpu, observe: observe) }
        var done: [String] = []
        for (gpu, setting) in settings {
            do { try set(setting, of: gpu, observe: observe) } catch var error as MigrationError where !done.isEmpty {
                if error.code == .failedPrecondition { error.code = .internal }
                error.message += "; done before that: \(done.joined(separator: ", "))"
                throw error
            }
            done.append("\(setting.text) for \(gpu)")
        }
    }

    /// Throws for a device that has no such setting, or is a VM's as a whole.
    private func require(_ setting: Setting, of gpu: PciAddress, observe: () throws -> DeviceTree) throws {
        switch setting {
        case .mig: return
        case .virtualFunctions(true):
            try requireWhole(gpu)
            guard sysfs.number("bus/pci/devices/\(gpu)/sriov_totalvfs") ?? 0 > 0 else {
                throw MigrationError(
                    .failedPrecondition, "\(gpu) has no virtual functions to turn on (no sriov_totalvfs)",
                    hint: "a GPU without them makes vGPUs by itself; for others enable SR-IOV in the firmware")
            }
        case .virtualFunctions(false): try requireWhole(gpu)
        case .mixedSizes: try requireGPU(gpu)
        }
        let uses = try observe()[gpu]?.uses.filter { !$0.isOfPart && [.domain, .reservation, .vfio].contains($0.kind) }
        guard let use = uses?.first else { return }
        throw MigrationError(
            .failedPrecondition, "\(gpu) is in use by \(use.by)",
            hint: "undeploy that domain, or take the device out of its definition")
    }

    private func set(_ setting: Setting, of gpu: PciAddress, observe: () throws -> DeviceTree) throws {
        switch setting {
        case .mig(let isOn): try setMIG(isOn, of: gpu, in: observe())
        case .virtualFunctions(true): try exclusively { try enableVirtualFunctions(of: gpu) }
        case .virtualFunctions(false): try exclusively { try disableVirtualFunctions(of: gpu, in: observe()) }
        case .mixedSizes(let isOn): try setMixedSizes(isOn, on: gpu)
        }
    }
}
