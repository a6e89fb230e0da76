package import FlotillaProtocol

/// Functions of a host that move together.
struct HostDevice {
    /// In address order.
    var functions: [PciFunction]

    var key: String { functions.first?.address ?? "" }
    var addresses: [String] { functions.map(\.address) }
}

extension HostProfile {
    /// All but virtual functions with the ids of their physical one: such a part of a device looks like the whole.
    package var wholeFunctions: [PciFunction] {
        let ids = Dictionary(pciFunctions.map { ($0.address, $0.id) }) { first, _ in first }
        return pciFunctions.filter { function in
            guard let physical = ids[function.physicalFunction] else { return true }
            return physical.vendor != function.id.vendor || physical.device != function.id.device
        }
    }
}

/// A host's PCI devices as candidates for one domain.
struct HostDevices {
    let host: HostProfile
    private let domain: String
    private let migration: String
    let byAddress: [String: PciFunction]
    let byGroup: [Int32: [PciFunction]]
    private let whole: [PciFunction]

    init(_ host: HostProfile, domain: String, migration: String) {
        self.host = host
        self.domain = domain
        self.migration = migration
        byAddress = Dictionary(host.pciFunctions.map { ($0.address, $0) }) { first, _ in first }
        byGroup = Dictionary(grouping: host.pciFunctions.filter { $0.iommuGroup >= 0 }, by: \.iommuGroup)
        whole = host.wholeFunctions
    }

    /// Every device with the wanted ids, usable or not: own first, then the same board, then by address.
    func candidates(for request: DeviceRequest) -> [HostDevice] {
        var seen: Set<String> = []
        let units = whole.filter { request.isServed(by: [$0]) || request.devices.count > 1 }
            .map(device(of:))
            .filter { request.isServed(by: $0.functions) && seen.insert($0.key).inserted }
        func rank(_ unit: HostDevice) -> Int {
            if unit.functions.contains(where: isOwn) { return 0 }
            return request.prefers(unit.functions) ? 1 : 2
        }
        return units.enumerated().sorted { (rank($0.element), $0.offset) < (rank($1.element), $1.offset) }.map(
            \.element)
    }

    private func device(of function: PciFunction) -> HostDevice {
        let companions = function.companions.compactMap { byAddress[$0] }
        return HostDevice(
            functions: ([function] + companions).sorted { a, b in
                guard let first = PciAddress(a.address), let second = PciAddress(b.address) else {
                    return a.address < b.address
                }
                return first < second
            })
    }

    /// What is wrong with the host for any device.
    var hostProblem: (message: String, remedy: String)? {
        if !host.iommuEnabled {
            return (
                "the IOMMU of host \(host.name) is off, so no device can be handed to a VM",
                "\(host.iommuRemedy), and try again"
            )
        }
        if !host.vfioAvailable {
            return (
                "host \(host.name) has no vfio-pci driver for its kernel \(host.kernel)",
                "install the kernel's full module package and run `modprobe vfio-pci`"
            )
        }
        return nil
    }

    /// Reasons that lie in the device itself. Each with the next step.
    func problems(_ unit: HostDevice) -> [(message: String, remedy: String)] {
        var problems: [(String, String)] = []
        for function in unit.functions {
            if function.bridge {
                problems.append(
                    (
                        "\(function.text) is a bridge, which can't be handed to a VM", "choose another device"
                    ))
            }
            if function.bootVga {
                problems.append(
                    (
                        "\(function.text) is the GPU the host booted with (boot VGA); its console would go with it",
                        "make another adapter (the board's BMC) the primary display in the host's firmware"
                    ))
            }
            if let user = foreignUser(function) {
                problems.append(
                    (
                        "\(function.text) is in use by \(user)", "free it there, or choose a host with a free one"
                    ))
            }
            if !function.unusable.isEmpty {
                problems.append(
                    (
                        "\(function.text) can't be handed to a VM: \(function.unusable)",
                        "flotilla gpu check \(function.address) on that host says what to do, or choose another host"
                    ))
            }
            if function.iommuGroup < 0 {
                problems.append(
                    (
                        "\(function.text) is in no IOMMU group, so the IOMMU does not cover it",
                        "check the host's firmware settings for DMA remapping"
                    ))
            }
        }
        // A group can belong to one domain only.
        let inside = Set(unit.addresses)
        for function in peers(unit) where !inside.contains(function.address) && isForVM(function) {
            if let user = foreignUser(function) {
                problems.append(
                    (
                        "\(unit.functions[0].address) shares IOMMU group \(function.iommuGroup) with \(function.text), "
                            + "which is in use by \(user)",
                        "free it there, or choose a host with a free one"
                    ))
            }
        }
        return problems
    }

    /// A VM has it, or is to have it, whatever its driver is until then.
    private func isForVM(_ function: PciFunction) -> Bool {
        function.driver.hasPrefix("vfio") || ["domain ", "VM "].contains(where: function.inUseBy.hasPrefix)
    }

    private func foreignUser(_ function: PciFunction) -> String? {
        function.inUseBy.isEmpty || isOwn(function) ? nil : function.inUseBy
    }

    /// The domain itself has it, or the ledger for its migration.
    private func isOwn(_ function: PciFunction) -> Bool {
        !domain.isEmpty && function.inUseBy == inUseBy(domain: domain)
            || !migration.isEmpty && function.inUseBy.contains("(migration \(migration))")
    }

    private func peers(_ unit: HostDevice) -> [PciFunction] {
        Set(unit.functions.map(\.iommuGroup)).sorted().flatMap { byGroup[$0] ?? [] }
    }

    /// Members of the unit's groups that keep them from being viable: bound to a host driver, not a bridge, and not
    /// among `besides`. Bridges and functions without a driver don't matter (kernel: vfio_dev_viable).
    func unrelated(_ unit: HostDevice, besides: Set<String>) -> [PciFunction] {
        let inside = Set(unit.addresses)
        return peers(unit).filter {
            !inside.contains($0.address) && !besides.contains($0.address) && $0.blocksGroup
        }
    }
}
