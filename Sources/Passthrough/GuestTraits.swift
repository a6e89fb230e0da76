package import FlotillaProtocol

extension VirtualMachine {
    /// From VMware's guest id ("windows2019srv_64Guest", "winNetEnterpriseGuest"), or what the tools reported.
    package var isWindows: Bool {
        guestID.lowercased().hasPrefix("win") || tools.family == "windowsGuest"
            || (guestID.isEmpty && guestFullName.lowercased().contains("windows"))
    }

    /// Older than AHCI and PCI Express: it boots from neither, so a machine with q35's chipset is none for it.
    ///
    /// Source: guest ids of vSphere's VirtualMachineGuestOsIdentifier; up to Windows Server 2003 and Linux 2.4.
    package var isLegacy: Bool {
        let id = guestID.lowercased()
        let families = [
            "dos", "win3", "win9", "winme", "winnt", "win2000", "winxp", "winnet", "redhat", "rhel2", "rhel3",
            "other24x",
            "netware", "os2", "openserver", "unixware", "solaris6", "solaris7", "solaris8", "solaris9",
            "turbolinuxguest",
            "mandrakeguest", "suseguest", "suse64", "slesguest", "nld9", "beos",
        ]
        return firmware != .efi && families.contains(where: id.hasPrefix)
    }
}

package enum GuestDiskBus: Sendable { case virtio, scsi, sata, ide }

extension DeployOptions {
    /// The bus disks get. Windows has no virtio driver unless someone installed one, and stops with
    /// INACCESSIBLE_BOOT_DEVICE without: it gets SATA unless asked otherwise. What is older than SATA gets IDE.
    package func diskBus(for vm: VirtualMachine) -> GuestDiskBus {
        switch diskBus {
        case .virtio: .virtio
        case .scsi: .scsi
        case .sataBus: .sata
        default: vm.isLegacy ? .ide : vm.isWindows ? .sata : .virtio
        }
    }

    /// NIC model, for the same reason as `diskBus(for:)`. Every system that boots from IDE only knows RTL8139.
    package func nicModel(for vm: VirtualMachine) -> String {
        switch diskBus(for: vm) {
        case .ide: "rtl8139"
        case .sata where vm.isWindows: "e1000e"
        case .virtio, .scsi, .sata: "virtio"
        }
    }

    /// The asked name, else one made from the VM's.
    package func domainName(for vm: VirtualMachine) -> String {
        domainName.isEmpty ? Passthrough.domainName(for: vm.name) : domainName
    }

    package func mapping(for network: String) -> NetworkMapping? {
        networks.first { $0.source == network && $0.target != nil }
    }
}
