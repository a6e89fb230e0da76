import FlotillaProtocol
import HostKit
import MigrationModel

extension VMXCapture {
    /// A device's place: `scsi0:1`.
    struct Slot: Hashable {
        enum Bus: Int { case ide, scsi, sata, nvme }
        let bus: Bus
        let controller: UInt32
        let unit: UInt32

        var text: String { "\(bus)\(controller):\(unit)" }
        /// The order of vSphere's device keys, which its firmware follows.
        var rank: (Int, UInt32, UInt32) { (bus.rawValue, controller, unit) }

        init?(key: String) {
            let slot = key.lowercased().prefix { $0 != "." }
            guard slot.count < key.count else { return nil }
            let buses: [(String, Bus)] = [("ide", .ide), ("scsi", .scsi), ("sata", .sata), ("nvme", .nvme)]
            guard let (name, bus) = buses.first(where: { slot.hasPrefix($0.0) }) else { return nil }
            let numbers = slot.dropFirst(name.count).split(separator: ":", omittingEmptySubsequences: false)
            guard numbers.count == 2, let controller = UInt32(numbers[0]), let unit = UInt32(numbers[1]),
                controller < 64, unit < 1024
            else { return nil }
            (self.bus, self.controller, self.unit) = (bus, controller, unit)
        }
    }

    mutating func captureDisks(_ stop: StopFlag) throws {
        let slots = Set(file.entries.compactMap { Slot(key: $0.key) }).sorted { $0.rank < $1.rank }
        for slot in slots {
            try stop.check()
            let key = slot.text
            let fileName = file.text("\(key).fileName")
            guard try file.flag("\(key).present") ?? (fileName != nil) else { continue }
            let type = file.text("\(key).deviceType")?.lowercased() ?? ""
            if type.contains("cdrom") || (type.isEmpty && fileName?.lowercased().hasSuffix(".iso") == true) {
                var removable = Removable()
                removable.kind = .cdrom
                removable.backing = fileName ?? ""
                removable.connected = try file.flag("\(key).startConnected") ?? true
                manifest.vm.removables.append(removable)
                continue
            }
            if try file.flag("\(slot.bus)\(slot.controller).present") == false {
                manifest.warn(
                    key, "\(key) hangs on a controller that is switched off; the guest doesn't see it, not carried",
                    remedy: "set \(slot.bus)\(slot.controller).present = \"TRUE\" on the source if it should come along"
                )
                continue
            }
            guard let fileName else {
                throw MigrationError(
                    .invalidArgument, "\(file.name): \(key) is present but has no fileName",
                    hint: "remove the disk from the VM or give it its file")
            }
            try captureDisk(slot, fileName: fileName, type: type)
        }
        if manifest.disks.isEmpty {
            manifest.warn("vm", "it has no disks", remedy: "check that this is the VM you mean")
        }
    }

    private mutating func captureDisk(_ slot: Slot, fileName: String, type: String) throws {
        let key = slot.text
        let chain = try VMDKChain(fileName, in: folder, owner: "\(file.name): \(key).fileName")
        _ = try chain.files(in: folder)
        guard let top = chain.links.first, let base = chain.links.last else { return }
        if let twin = manifest.disks.first(where: { $0.source.path == top.region.path }) {
            throw MigrationError(
                .invalidArgument, "\(file.name): \(key) and \(twin.label) are the same file \(fileName.printable)")
        }
        var disk = Disk()
        disk.id = "disk\(manifest.disks.count)"
        disk.capacityBytes = top.summary.capacity
        disk.controller = try controller(slot)
        disk.busNumber = slot.controller
        disk.unitNumber = slot.unit
        disk.label = key
        disk.thin = base.summary.thin
        disk.uuid = base.summary.uuid
        disk.source.path = top.region.path
        disk.source.format = "vmdk"
        disk.source.variant = top.summary.createType
        if chain.links.count > 1 { disk.backingChain = chain.links.map(\.region.path) }
        try captureMode(of: &disk, key)
        try captureSharing(of: &disk, slot)
        captureRawDevice(of: &disk, base.summary, type: type)
        if chain.links.count > 1 && manifest.vm.snapshots.isEmpty {
            manifest.warn(
                disk.id, "\(key) is a chain of \(chain.links.count) images; the state of the newest is carried",
                remedy: "delete (consolidate) the snapshots on the source, or go on without them")
        }
        manifest.disks.append(disk)
    }

    private mutating func controller(_ slot: Slot) throws -> DiskController {
        switch slot.bus {
        case .ide: return .ide
        case .sata: return .sata
        case .nvme: return .nvme
        case .scsi:
            let key = "scsi\(slot.controller).virtualDev"
            switch file.text(key)?.lowercased() {
            case "lsilogic", nil: return .lsiLogic
            case "lsisas1068": return .lsiLogicSas
            case "pvscsi": return .pvscsi
            case "buslogic": return .busLogic
            default: throw file.invalid(key, "is not a SCSI controller this program knows")
            }
        }
    }

    private mutating func captureMode(of disk: inout Disk, _ key: String) throws {
        switch file.text("\(key).mode")?.lowercased() {
        case nil, "persistent", "undoable", "append": disk.mode = "persistent"
        case "independent-persistent":
            disk.mode = "independent_persistent"
            manifest.warn(
                disk.id, "\(key) is an independent disk: no snapshot of the VM ever covered it",
                remedy: "keep the VM shut down until the migration is done")
        case "independent-nonpersistent", "nonpersistent":
            disk.mode = "independent_nonpersistent"
            manifest.warn(
                disk.id, "\(key) forgets its changes at power-off; on the target it keeps them",
                remedy: "make it persistent on the source if that is what you want, or give the target a fresh copy")
        default: throw file.invalid("\(key).mode", "is not a disk mode this program knows")
        }
    }

    private mutating func captureSharing(of disk: inout Disk, _ slot: Slot) throws {
        let sharing = file.text("\(slot.text).sharing")?.lowercased()
        let bus = file.text("\(slot.bus)\(slot.controller).sharedBus")?.lowercased()
        disk.shared = sharing == "multi-writer" || bus == "virtual" || bus == "physical"
        guard disk.shared else { return }
        manifest.block(
            disk.id,
            "\(slot.text) is shared with other VMs (\(sharing == "multi-writer" ? "multi-writer" : "shared bus"))",
            remedy: "move the cluster's data to storage of the target, or stop sharing the disk")
    }

    private mutating func captureRawDevice(of disk: inout Disk, _ summary: VMDKSummary, type: String) {
        switch summary.createType.lowercased() {
        case "vmfspassthroughrawdevicemap": disk.rawDeviceMapping = "physicalMode"
        case "vmfsrawdevicemap", "vmfsrdm": disk.rawDeviceMapping = "virtualMode"
        case "fulldevice", "partitioneddevice": disk.rawDeviceMapping = "physicalMode"
        default:
            if type.contains("rawdisk") || summary.extents.contains(where: \.isDevice) {
                disk.rawDeviceMapping = "physicalMode"
            }
        }
        guard !disk.rawDeviceMapping.isEmpty else { return }
        manifest.block(
            disk.id,
            "\(disk.label) is a raw device mapping (\(disk.rawDeviceMapping)); its bytes are not in these files",
            remedy: "convert it to a virtual disk on the source (vmkfstools -i), or attach the LUN to the target")
    }
}
