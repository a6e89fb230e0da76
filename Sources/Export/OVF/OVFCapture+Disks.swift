import FlotillaProtocol
import HostKit
import MigrationModel

extension OVFCapture {
    private struct Place {
        let controller: DiskController
        let rank: Int
        let bus: UInt32
        let unit: UInt32
        let item: OVFItem
    }

    mutating func captureDisks(_ stop: StopFlag) throws {
        var controllers: [String: (kind: DiskController, rank: Int, bus: UInt32)] = [:]
        var buses: [Int: UInt32] = [:]
        for item in items {
            guard let (kind, rank) = try controllerKind(item) else { continue }
            let bus = item["Address"].flatMap { UInt32($0) } ?? buses[rank, default: 0]
            buses[rank] = bus &+ 1
            controllers[item.id] = (kind, rank, bus)
        }
        var places: [Place] = []
        var units: [String: UInt32] = [:]
        for item in items where item.kind == .disk {
            let owner = "\(envelope.name): \(item.name.printable)"
            guard let parent = item.parent, let controller = controllers[parent] else {
                throw MigrationError(
                    .invalidArgument,
                    "\(owner): its controller (Parent \((item.parent ?? "").printable)) does not exist")
            }
            let unit = try item.number("AddressOnParent").map { UInt32(clamping: $0) } ?? units[parent, default: 0]
            units[parent] = unit &+ 1
            let twin = places.first {
                $0.rank == controller.rank && $0.bus == controller.bus && $0.unit == unit
            }
            if let twin {
                throw MigrationError(
                    .invalidArgument, "\(owner): has the same controller and unit as \(twin.item.name.printable)")
            }
            places.append(
                Place(controller: controller.kind, rank: controller.rank, bus: controller.bus, unit: unit, item: item))
        }
        places.sort { ($0.rank, $0.bus, $0.unit) < ($1.rank, $1.bus, $1.unit) }
        var used: Set<String> = []
        for place in places {
            try stop.check()
            try captureDisk(place, used: &used)
        }
        for id in envelope.diskOrder where !used.contains(id) {
            manifest.warn(
                "vm", "the OVF's disk \(id.printable) is attached to no controller of this VM and not carried",
                remedy: "check that the VM doesn't need it")
        }
        if manifest.disks.isEmpty {
            manifest.warn("vm", "it has no disks", remedy: "check that this is the VM you mean")
        }
    }

    /// Kind and rank in the order of vSphere's device keys; nil for other devices.
    private mutating func controllerKind(_ item: OVFItem) throws -> (DiskController, Int)? {
        switch item.kind {
        case .ide: return (.ide, 0)
        case .scsi:
            switch item.subtype.split(separator: " ").first ?? "" {
            case "lsilogicsas": return (.lsiLogicSas, 1)
            case "virtualscsi": return (.pvscsi, 1)
            case "buslogic": return (.busLogic, 1)
            case "lsilogic", "": return (.lsiLogic, 1)
            case let other:
                manifest.warn(
                    "vm",
                    "its SCSI controller \(item.name.printable) is of the unknown type "
                        + "'\(String(other).printable)'; taken as lsilogic",
                    remedy: "change it to VirtualSCSI on the source")
                return (.lsiLogic, 1)
            }
        case .otherStorage:
            if item.subtype.contains("nvme") { return (.nvme, 3) }
            if item.subtype.contains("ahci") || item.subtype.contains("sata") || item.subtype.isEmpty {
                return (.sata, 2)
            }
            throw MigrationError(
                .unimplemented,
                "\(envelope.name): storage controller \(item.name.printable) is of the unknown type "
                    + "'\(item.subtype.printable)'", hint: "move its disks to a SCSI, SATA or NVMe controller")
        default: return nil
        }
    }

    private mutating func captureDisk(_ place: Place, used: inout Set<String>) throws {
        let item = place.item
        let owner = "\(envelope.name): \(item.name.printable)"
        guard let resource = item.hostResources.first, !resource.isEmpty else {
            throw MigrationError(.invalidArgument, "\(owner): names no disk (HostResource)")
        }
        let path = resource.hasPrefix("ovf:") ? String(resource.dropFirst(4)) : resource
        var disk = Disk()
        disk.id = "disk\(manifest.disks.count)"
        disk.controller = place.controller
        disk.busNumber = place.bus
        disk.unitNumber = place.unit
        disk.label = item.name
        disk.mode = "persistent"
        if let id = path.suffix(after: "/disk/") {
            guard let described = envelope.disks[id] else {
                throw MigrationError(.invalidArgument, "\(owner): the disk \(id.printable) is not in the DiskSection")
            }
            guard used.insert(id).inserted else {
                throw MigrationError(.invalidArgument, "\(owner): the disk \(id.printable) is attached twice")
            }
            disk.capacityBytes = described.capacity
            if let file = described.file {
                try captureContent(of: &disk, file, variant: described.variant, stated: described.capacity)
            } else {
                manifest.block(
                    disk.id, "\(item.name.printable) (\(id.printable)) starts empty: the package holds no file for it",
                    remedy: "remove it from the OVF and add an empty disk on the target, or export the VM with its data"
                )
            }
        } else if let id = path.suffix(after: "/file/") {
            guard let file = envelope.files[id] else {
                throw MigrationError(.invalidArgument, "\(owner): the file \(id.printable) is not in the References")
            }
            try captureContent(of: &disk, file, variant: "", stated: nil)
        } else {
            throw MigrationError(
                .invalidArgument, "\(owner): HostResource '\(resource.printable)' is neither ovf:/disk/ nor ovf:/file/")
        }
        captureSettings(of: &disk, item)
        bootKeys[item.id] = bootKey(disk)
        manifest.disks.append(disk)
    }

    private mutating func captureContent(
        of disk: inout Disk, _ file: OVFEnvelope.File, variant: String, stated: UInt64?
    ) throws {
        let shown = "\(envelope.name): \(file.name.printable)"
        let summary = try VMDKSummary(file.region, owner: shown)
        if summary.isDelta {
            throw MigrationError(
                .unimplemented, "\(shown): is a snapshot's delta without its parent",
                hint: "consolidate the VM's disks on the source and export it again")
        }
        if !summary.extents.isEmpty {
            guard let folder = package.folder else {
                throw MigrationError(
                    .unimplemented, "\(shown): is a descriptor whose extents are other members of the archive",
                    hint: "extract the OVA and give ovf:PATH")
            }
            _ = try VMDKChain(file.name, in: folder, owner: shown).files(in: folder)
        }
        if let stated, stated != summary.capacity {
            manifest.warn(
                disk.id,
                "\(file.name.printable) holds \(summary.capacity) bytes, the OVF says \(stated); "
                    + "the image's own size counts", remedy: "export the VM again if the guest misses space")
        }
        disk.capacityBytes = summary.capacity
        disk.uuid = summary.uuid
        // Compressed or sparse for transport; how the source stored it is not known.
        disk.thin = summary.thin
        disk.source.path = file.region.path
        if Files.name(of: file.region.path) != file.name { disk.source.member = file.name }
        disk.source.offset = file.region.offset
        disk.source.length = file.region.length
        disk.source.format = "vmdk"
        disk.source.variant = summary.createType.isEmpty ? variant : summary.createType
        disk.source.expected = digests?.expected(for: file.name) ?? []
        if let digests, disk.source.expected.isEmpty {
            manifest.note(disk.id, "\(digests.name) has no digest of \(file.name.printable); it can't be checked")
        }
    }

    private mutating func captureSettings(of disk: inout Disk, _ item: OVFItem) {
        if let mode = item.setting("backing.diskMode")?.lowercased() {
            disk.mode = mode
            if mode.hasPrefix("independent") {
                manifest.warn(
                    disk.id, "\(item.name.printable) is an independent disk (\(mode.printable))",
                    remedy: "keep the VM shut down until the migration is done")
            }
        }
        if let uuid = item.setting("backing.uuid")?.canonicalUUID { disk.uuid = uuid }
        if let sharing = item.setting("backing.sharing"), sharing.lowercased().contains("multiwriter") {
            disk.shared = true
            manifest.block(
                disk.id, "\(item.name.printable) is shared with other VMs (multi-writer)",
                remedy: "move the cluster's data to storage of the target, or stop sharing the disk")
        }
    }
}

extension String {
    fileprivate func suffix(after prefix: String) -> String? {
        hasPrefix(prefix) && count > prefix.count ? String(dropFirst(prefix.count)) : nil
    }
}
