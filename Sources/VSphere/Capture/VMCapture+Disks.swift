import Export
import FlotillaProtocol
import MigrationModel

/// A disk controller's type, and what a slot on it is called.
enum ControllerKind: String, CaseIterable {
    case ide, scsi, sata, nvme

    /// The class of the API, "VirtualLsiLogicController".
    init?(type: String) {
        switch type {
        case "VirtualIDEController": self = .ide
        case "VirtualAHCIController", "VirtualSATAController": self = .sata
        case "VirtualNVMEController": self = .nvme
        case "ParaVirtualSCSIController", "VirtualLsiLogicController", "VirtualLsiLogicSASController",
            "VirtualBusLogicController", "VirtualSCSIController":
            self = .scsi
        default: return nil
        }
    }

    static func controller(type: String) -> DiskController {
        switch type {
        case "VirtualIDEController": .ide
        case "VirtualAHCIController", "VirtualSATAController": .sata
        case "VirtualNVMEController": .nvme
        case "ParaVirtualSCSIController": .pvscsi
        case "VirtualLsiLogicController": .lsiLogic
        case "VirtualLsiLogicSASController": .lsiLogicSas
        case "VirtualBusLogicController": .busLogic
        default: .unspecified
        }
    }

    var rank: Int { Self.allCases.firstIndex(of: self) ?? 0 }
}

extension VMCapture {
    private struct Slot {
        let kind: ControllerKind
        let controller: VIMNode
        let bus: UInt32
        let unit: UInt32

        var text: String { "\(kind.rawValue)\(bus):\(unit)" }
        /// The order the firmware sees them in.
        var rank: (Int, UInt32, UInt32) { (kind.rank, bus, unit) }
    }

    private func slot(of device: VIMNode) -> Slot? {
        guard let controller = device.number("controllerKey").flatMap({ devices[$0] }),
            let kind = ControllerKind(type: controller.type), let unit = device.number("unitNumber")
        else { return nil }
        return Slot(
            kind: kind, controller: controller, bus: UInt32(clamping: controller.number("busNumber") ?? 0),
            unit: UInt32(clamping: unit))
    }

    mutating func captureDisks() {
        var disks: [(device: VIMNode, slot: Slot)] = []
        for device in orderedDevices where device.type == "VirtualDisk" {
            let label = device["deviceInfo"]?.text("label") ?? "a disk"
            guard let slot = slot(of: device) else {
                manifest.block(
                    "vm", "\(label.printable) hangs on a controller this program doesn't know",
                    remedy: "move it to a SCSI, SATA or NVMe controller on the source")
                continue
            }
            disks.append((device, slot))
        }
        for (device, slot) in disks.sorted(by: { $0.slot.rank < $1.slot.rank }) { captureDisk(device, slot) }
        if manifest.disks.isEmpty {
            manifest.warn("vm", "it has no disks", remedy: "check that this is the VM you mean")
        }
    }

    private mutating func captureDisk(_ device: VIMNode, _ slot: Slot) {
        let backing = device["backing"]
        var disk = Disk()
        disk.id = "disk\(manifest.disks.count)"
        let (kilobytes, overflow) = UInt64(clamping: device.number("capacityInKB") ?? 0)
            .multipliedReportingOverflow(by: 1024)
        disk.capacityBytes = device.number("capacityInBytes").map { UInt64(clamping: $0) } ?? (overflow ? 0 : kilobytes)
        disk.controller = ControllerKind.controller(type: slot.controller.type)
        disk.busNumber = slot.bus
        disk.unitNumber = slot.unit
        disk.label = slot.text
        disk.mode = backing?.text("diskMode") ?? "persistent"
        disk.thin = backing?.flag("thinProvisioned") ?? false
        disk.uuid = backing?.text("uuid")?.canonicalUUID ?? ""
        disk.datastore =
            inventory.datastore(backing?.reference("datastore")?.value)?.name
            ?? backing?.text("fileName").flatMap { DatastorePath($0)?.datastore } ?? ""
        disk.source.path = backing?.text("fileName") ?? ""
        disk.source.format = "vmdk"
        disk.source.variant = source.transfer == .nfc ? "streamOptimized" : "monolithicFlat"
        var chain: [String] = []
        var link = backing
        while let current = link, chain.count < 64 {
            chain.append(current.text("fileName") ?? "")
            link = current["parent"]
        }
        if chain.count > 1 { disk.backingChain = chain }
        if let key = device.number("key") { labels[key] = slot.text }
        manifest.disks.append(disk)
        findings(of: disk, backing, slot.controller)
        let isShared =
            backing?.text("sharing") == "sharingMultiWriter"
            || !["noSharing", nil].contains(slot.controller.text("sharedBus"))
        manifest.disks[manifest.disks.count - 1].shared = isShared
        manifest.disks[manifest.disks.count - 1].rawDeviceMapping = rawDeviceMapping(backing)
        if isShared {
            manifest.block(
                disk.id, "\(slot.text) may be shared with other VMs (multi-writer disk or shared bus)",
                remedy: "move the cluster's data to storage of the target, or stop sharing the disk")
        }
    }

    private func rawDeviceMapping(_ backing: VIMNode?) -> String {
        switch backing?.type {
        case "VirtualDiskRawDiskMappingVer1BackingInfo": backing?.text("compatibilityMode") ?? "physicalMode"
        case "VirtualDiskRawDiskVer2BackingInfo", "VirtualDiskPartitionedRawDiskVer2BackingInfo": "physicalMode"
        default: ""
        }
    }

    private mutating func findings(of disk: Disk, _ backing: VIMNode?, _ controller: VIMNode) {
        switch rawDeviceMapping(backing) {
        case "": break
        case "virtualMode":
            manifest.warn(
                disk.id, "\(disk.label) is a raw device mapping in virtual mode; its LUN's content becomes an image",
                remedy: "make sure that nothing else writes to the LUN, or attach the LUN to the target yourself")
        default:
            manifest.block(
                disk.id, "\(disk.label) is a raw device mapping in physical mode, which can't be exported",
                remedy: "convert it to a virtual disk on the source (vmkfstools -i), or attach the LUN to the target")
        }
        if source.transfer == .datastore {
            let kind = inventory.datastore(backing?.reference("datastore")?.value)?.kind ?? ""
            if !rawDeviceMapping(backing).isEmpty || ["vsan", "vsand", "vvol"].contains(kind.lowercased()) {
                let place = "\(disk.datastore.printable) (\(kind.printable))"
                manifest.block(
                    disk.id, "\(disk.label) is no flat file of datastore \(place)", remedy: "leave --via datastore out")
            }
        }
        if backing?["keyId"] != nil && !manifest.vm.encrypted {
            manifest.block(
                disk.id, "\(disk.label) is encrypted", remedy: "decrypt it on the source by its storage policy")
        }
        if disk.capacityBytes == 0 {
            manifest.block(
                disk.id, "\(disk.label): the server states no size", remedy: "look at the disk on the source")
        }
        if disk.mode.hasPrefix("independent") && source.snapshot {
            manifest.block(
                disk.id, "\(disk.label) is an independent disk, which no snapshot covers",
                remedy: "shut the VM down and migrate it without --snapshot, or make the disk dependent")
        } else if disk.mode == "independent_persistent" {
            manifest.warn(
                disk.id, "\(disk.label) is an independent disk: no snapshot of the VM ever covered it",
                remedy: "keep the VM shut down until the migration is done")
        }
        if ["independent_nonpersistent", "nonpersistent"].contains(disk.mode) {
            manifest.warn(
                disk.id, "\(disk.label) forgets its changes at power-off; on the target it keeps them",
                remedy: "make it persistent on the source if that is what you want, or give the target a fresh copy")
        }
    }
}

/// "[datastore 1] web/web.vmdk".
struct DatastorePath {
    let datastore: String
    let path: String

    init?(_ text: String) {
        guard text.hasPrefix("["), let close = text.firstIndex(of: "]") else { return nil }
        datastore = String(text[text.index(after: text.startIndex)..<close])
        path = String(text[text.index(after: close)...].drop { $0 == " " })
        guard !datastore.isEmpty, !path.isEmpty else { return nil }
    }
}
