import MigrationModel

extension GPULedger {
    /// Resets dirty functions, which are free then. A mediated device is free once it is gone. What isn't dirty is left
    /// alone. Held under the ledger's lock, so nobody reserves one meanwhile; a function-level reset takes 0.1 to 1 s.
    ///
    /// - Parameters:
    ///   - resources: nil: all dirty ones.
    ///   - holders: who has devices open; nil: the running host's, looked at under the lock.
    /// - Throws: the first failure, after trying all: `failedPrecondition` for one that is in use or that the kernel can't
    ///   reset. Those stay dirty.
    package func reset(
        _ resources: [GPUResource]? = nil, sysfs: Sysfs = Sysfs(), kernel: any SysfsWriter = KernelWriter(),
        holders: DeviceHolders? = nil
    ) throws {
        let failure: (any Error)? = try update { book in
            let holders = holders ?? DeviceHolders(proc: "/proc")
            var failure: (any Error)?
            book.entries.removeAll { entry in
                guard entry.state == .dirty,
                    resources.map({ $0.contains { $0.key == entry.resource.key } }) ?? true
                else { return false }
                do {
                    try Self.reset(entry.resource, sysfs, kernel, holders)
                    return true
                } catch {
                    failure = failure ?? error
                    return false
                }
            }
            return failure
        }
        if let failure { throw failure }
    }

    private static func reset(
        _ resource: GPUResource, _ sysfs: Sysfs, _ kernel: any SysfsWriter, _ holders: DeviceHolders
    ) throws {
        guard let function = resource.function else {
            guard !sysfs.exists("bus/mdev/devices/\(resource.mdev ?? "")") else {
                throw MigrationError(
                    .failedPrecondition, "\(resource) can't be reset", hint: "destroy it and create another")
            }
            return
        }
        let folder = "bus/pci/devices/\(function)"
        // A device that was taken out has lost its power, and with it its memory.
        guard sysfs.exists(folder) else { return }
        if let holder = holders.vfioUser(of: folder, sysfs: sysfs) {
            throw MigrationError(
                .failedPrecondition, "\(function) can't be reset: \(holder) has it open through VFIO",
                hint: "end it first")
        }
        let driver = sysfs.linkName("\(folder)/driver") ?? ""
        guard driver.isEmpty || driver.hasPrefix("vfio") else {
            throw MigrationError(
                .failedPrecondition, "\(function) can't be reset while \(driver) drives it",
                hint: "reset it while it is bound to vfio-pci, before it is released")
        }
        try resource.requireReset(sysfs)
        if let write = resource.resetting { try kernel.write(write.text, to: write.attribute) }
    }
}

extension GPUResource {
    /// The write that resets it; nil for a mediated device.
    package var resetting: SysfsWrite? {
        function.map { SysfsWrite(attribute: "bus/pci/devices/\($0)/reset", text: "1\n") }
    }

    /// Throws `failedPrecondition` for a function that is there, and that the kernel can't reset.
    func requireReset(_ sysfs: Sysfs) throws {
        guard let function, sysfs.exists("bus/pci/devices/\(function)"),
            !sysfs.exists("bus/pci/devices/\(function)/reset")
        else { return }
        throw MigrationError(
            .failedPrecondition, "the kernel knows no way to reset \(function) (it has no reset attribute)",
            hint: "reboot the host (not by kexec) before another VM gets this device")
    }
}
