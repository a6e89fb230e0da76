import FlotillaProtocol

/// Positions in the boot order, from 1; what is absent is not booted from.
struct BootOrder {
    var disks: [String: Int] = [:]
    var nics: [String: Int] = [:]
}

extension DomainXML {
    /// The manifest's order as far as its devices exist here (a CD is not carried), then the boot disk where no
    /// disk was named. VMware's "ethernetN" is the Nth NIC.
    func bootOrder() -> BootOrder {
        var order = BootOrder()
        var next = 1
        func add(disk: Disk) {
            guard order.disks[disk.id] == nil else { return }
            order.disks[disk.id] = next
            next += 1
        }
        let bootDisk = manifest.disks.first(where: \.boot) ?? manifest.disks.first
        for entry in vm.bootOrder {
            let parts = entry.split(separator: ":", maxSplits: 1).map(String.init)
            switch parts.first {
            case "disk":
                let named =
                    parts.count > 1 ? manifest.disks.first { $0.sourceKey == parts[1] || $0.id == parts[1] } : bootDisk
                if let named { add(disk: named) }
            case "net":
                let nic =
                    parts.count > 1
                    ? manifest.nics.enumerated().first {
                        "ethernet\($0.offset)" == parts[1] || $0.element.id == parts[1]
                    }?.element
                    : manifest.nics.first
                if let nic, order.nics[nic.id] == nil {
                    order.nics[nic.id] = next
                    next += 1
                }
            default: continue
            }
        }
        if order.disks.isEmpty, let bootDisk { add(disk: bootDisk) }
        return order
    }
}

extension Disk {
    /// VMware's name of the position, "scsi0:0".
    var sourceKey: String {
        let bus =
            switch controller {
            case .sata: "sata"
            case .nvme: "nvme"
            case .ide: "ide"
            default: "scsi"
            }
        return "\(bus)\(busNumber):\(unitNumber)"
    }
}
