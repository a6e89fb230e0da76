package import FlotillaProtocol

extension VirtualMachine {
    /// From VMware's guest id ("windows2019srv_64Guest", "winNetEnterpriseGuest"), or what the tools reported.
    package var isWindows: Bool {
        guestID.lowercased().hasPrefix("win") || tools.family == "windowsGuest"
            || (guestID.isEmpty && guestFullName.lowercased().contains("windows"))
    }
}

extension DeployOptions {
    /// The bus disks get. Windows has no virtio driver unless someone installed one, and stops with
    /// INACCESSIBLE_BOOT_DEVICE without: it gets SATA unless asked otherwise.
    package func diskBus(for vm: VirtualMachine) -> DiskBus {
        switch diskBus {
        case .virtio, .scsi, .sataBus: diskBus
        default: vm.isWindows ? .sataBus : .virtio
        }
    }

    /// NIC model, for the same reason as `diskBus(for:)`.
    package func nicModel(for vm: VirtualMachine) -> String {
        vm.isWindows && diskBus(for: vm) == .sataBus ? "e1000e" : "virtio"
    }

    /// The asked name, else one made from the VM's.
    package func domainName(for vm: VirtualMachine) -> String {
        domainName.isEmpty ? Passthrough.domainName(for: vm.name) : domainName
    }

    package func mapping(for network: String) -> NetworkMapping? {
        networks.first { $0.source == network && $0.target != nil }
    }
}
