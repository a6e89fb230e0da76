import FlotillaProtocol
import MigrationModel

/// What a person's command that was killed left: nobody's attempt goes on with it.
extension VgpuHost {
    /// What it left for this domain without a vGPU, in words.
    package func unfinished(ofDomain domain: String) throws -> [String] {
        let change = try migs.read().change.map { "a change of the GPU instances of \($0.gpu) that did not end" }
        let instances = try unfinishedInstances(of: domain).map { made in
            "the GPU instance \(made.instance.name) (\(made.instance.id)) of \(made.gpu)"
        }
        return try [change].compactMap(\.self) + instances
            + unfinishedReservations(of: domain).map { "the reservation of \($0)" }
    }

    /// Takes that back. Returns what it was.
    @discardableResult
    package func takeBackUnfinished(ofDomain domain: String) throws -> [String] {
        try exclusively {
            let told = try unfinished(ofDomain: domain)
            guard !told.isEmpty else { return [] }
            try settleInstances()
            for made in try unfinishedInstances(of: domain) { try removeInstance(of: made.owner, device: made.device) }
            try ledger.forget(
                unfinishedReservations(of: domain), of: GPUOwner(domain: domain, migration: "", fence: 0))
            return told
        }
    }

    private func unfinishedInstances(of domain: String) throws -> [MIGRecords.Made] {
        try instancesWithoutVgpu().filter { $0.owner.migration.isEmpty && $0.owner.domain == domain }
    }

    /// Of a process that is gone, and for a vGPU of which nothing else is known.
    private func unfinishedReservations(of domain: String) throws -> [GPUResource] {
        let known = try Set(store.read().compactMap { $0.resource?.key })
        return try ledger.reservations().filter { entry in
            entry.owner.migration.isEmpty && entry.owner.domain == domain && entry.state == .reserved
                && entry.isUntouched == true && !(entry.keeper.map(ledger.keeper.isOther) ?? false)
                && !known.contains(entry.resource.key)
        }.map(\.resource)
    }

    /// A person's vGPU is replaced by none: the domain may name it.
    ///
    /// - Throws: `failedPrecondition` when the device is another one, or on another GPU than `gpu`.
    func requireSame(_ known: VgpuRecord, _ profile: VgpuProfile, on gpu: PciAddress?) throws {
        guard known.owner.migration.isEmpty, known.phase == .present, exists(known) else { return }
        let isThere = gpu.map { "\($0)" == known.physical } ?? true
        guard VgpuProfile(known.profile) != profile || !isThere else { return }
        throw MigrationError(
            .failedPrecondition,
            "\(known.device) of domain \(known.owner.domain) is a \(known.profile) already, on \(known.function)",
            hint:
                "name another --device; or destroy that one first: flotilla gpu destroy --domain \(known.owner.domain) "
                + "--device \(known.device)")
    }

    /// Throws for what makes no vGPUs: `failedPrecondition` for another kind of device, and what `requireWhole` throws.
    func requireGPU(_ gpu: PciAddress) throws {
        try requireWhole(gpu)
        let folder = "bus/pci/devices/\(gpu)"
        let classCode = (sysfs.number("\(folder)/class") ?? 0) >> 16
        guard classCode != 0x03, sysfs.number("\(folder)/vendor") != 0x10de,
            !places().contains(where: { $0.physical == gpu })
        else { return }
        throw MigrationError(
            .failedPrecondition, "\(gpu) is no GPU (class \(padded(UInt32(clamping: classCode), 2)))",
            hint: "flotilla gpu list shows the GPUs")
    }

    /// Throws `notFound`, or `failedPrecondition` for a part of a device and for one that is there for a VM as a whole.
    func requireWhole(_ gpu: PciAddress) throws {
        let folder = "bus/pci/devices/\(gpu)"
        guard sysfs.exists(folder) else {
            throw MigrationError(
                .notFound, "this host has no PCI device \(gpu)", hint: "flotilla gpu list shows what there is")
        }
        func refuse(_ why: String, _ hint: String) throws {
            throw MigrationError(.failedPrecondition, "\(gpu) \(why)", hint: hint)
        }
        if let physical = sysfs.linkName("\(folder)/physfn") {
            try refuse("is a virtual function of \(physical)", "name that")
        }
        if let driver = sysfs.linkName("\(folder)/driver"), driver.hasPrefix("vfio") {
            try refuse("waits for a VM as a whole, on \(driver)", "flotilla gpu release \(gpu), if no VM is to have it")
        }
        let whole = try ledger.reservations().first { $0.resource.function == gpu && $0.state == .reserved }
        if let whole {
            try refuse("is reserved for \(whole.owner) as a whole", "choose another GPU, or undeploy that domain")
        }
    }

    /// Throws when the functions are on and the vendor's driver makes vGPUs on none of them: turning on does nothing more.
    func requireOffers(_ gpu: PciAddress) throws {
        let count = virtualFunctions(of: gpu).count
        guard count > 0, sysfs.number("bus/pci/devices/\(gpu)/vendor") == 0x10de,
            !places().contains(where: { $0.physical == gpu && $0.isVirtual })
        else { return }
        throw MigrationError(
            .failedPrecondition,
            "\(count) virtual functions of \(gpu) are on, and NVIDIA's vGPU driver has taken none of them",
            hint:
                "flotilla gpu profiles --disable \(gpu), then --enable \(gpu); journalctl -k and -u nvidia-vgpu-mgr say "
                + "why it did not")
    }
}
