import Export
import FlotillaProtocol
import MigrationModel
import SwiftProtobuf

extension VMCapture {
    /// Power state and snapshots, and what they mean for moving the VM.
    mutating func captureState() {
        switch content.text("runtime.powerState") {
        case "poweredOff": manifest.vm.powerState = .poweredOff
        case "poweredOn": manifest.vm.powerState = .poweredOn
        case "suspended": manifest.vm.powerState = .suspended
        default: manifest.vm.powerState = .unspecified
        }
        switch manifest.vm.powerState {
        case .poweredOff: break
        case .poweredOn where hasHostDevice:
            manifest.block(
                "vm",
                source.snapshot
                    ? "it is running with a device of its host, and of such a VM vSphere makes no snapshot"
                    : "the VM is running", remedy: "shut it down on the source")
        case .poweredOn where source.snapshot:
            if orderedDevices.contains(where: \.isVirtualGPU) {
                manifest.warn(
                    "vm", "it is running with a vGPU: not every vSphere makes a snapshot of such a VM",
                    remedy: "shut it down on the source if the snapshot is refused")
            }
            manifest.warn(
                "vm", "it is running: its disks are moved as a snapshot finds them, and what it writes later is not",
                remedy: "shut it down on the source before the target's VM is started, or migrate it shut down")
        case .poweredOn:
            manifest.block(
                "vm", "the VM is running", remedy: "shut it down, or move it as a snapshot finds it (--snapshot)")
        case .suspended:
            manifest.block(
                "vm", "the VM is suspended; its memory can't be carried",
                remedy: "resume it on the source and shut it down")
        default:
            manifest.block("vm", "its power state is not known", remedy: "reconnect its host on the source")
        }
        let current = content["snapshot"]?.reference("currentSnapshot")
        for tree in content["snapshot"]?.all("rootSnapshotList") ?? [] { add(tree, current) }
        if !manifest.vm.snapshots.isEmpty {
            manifest.warn(
                "vm", "it has \(manifest.vm.snapshots.count) snapshots; only its current state is carried",
                remedy: "delete (consolidate) the snapshots on the source, or go on without them")
            if source.transfer == .datastore {
                manifest.block(
                    "vm", "with snapshots its disks are no flat files that could be read from the datastore",
                    remedy: "delete (consolidate) the snapshots, or leave --via datastore out")
            }
        }
    }

    /// DirectPath I/O, whole or a virtual function.
    private var hasHostDevice: Bool {
        orderedDevices.contains {
            $0.type == "VirtualSriovEthernetCard" || $0.type == "VirtualPCIPassthrough" && !$0.isVirtualGPU
        }
    }

    /// Depth and count are bounded by what was parsed.
    private mutating func add(_ tree: VIMNode, _ current: ObjectReference?) {
        var snapshot = Snapshot()
        snapshot.name = unescapedName(tree.text("name") ?? "")
        snapshot.moid = tree.reference("snapshot")?.value ?? ""
        snapshot.quiesced = tree.flag("quiesced") ?? false
        snapshot.current = tree.reference("snapshot") == current
        if let text = tree.text("createTime"), let moment = Moment(timestamp: text) {
            snapshot.createdAt = moment.protobuf
        }
        manifest.vm.snapshots.append(snapshot)
        for child in tree.all("childSnapshotList") { add(child, current) }
    }
}

extension VIMNode {
    fileprivate var isVirtualGPU: Bool { self["backing"]?.type == "VirtualPCIPassthroughVmiopBackingInfo" }
}

extension Moment {
    var protobuf: Google_Protobuf_Timestamp {
        var timestamp = Google_Protobuf_Timestamp()
        timestamp.seconds = milliseconds / 1000
        timestamp.nanos = Int32(milliseconds % 1000) * 1_000_000
        return timestamp
    }

    /// xsd:dateTime with a zone, "2024-05-06T07:08:09.123Z"; nil for anything else.
    init?(timestamp text: String) {
        let bytes = Array(text.utf8)
        func number(_ range: Range<Int>) -> Int64? {
            guard range.upperBound <= bytes.count else { return nil }
            return Int64(String(decoding: bytes[range], as: UTF8.self))
        }
        guard let year = number(0..<4), let month = number(5..<7), let day = number(8..<10), let hour = number(11..<13),
            let minute = number(14..<16), let second = number(17..<19), (1...12).contains(month),
            (1...31).contains(day),
            (1970...9999).contains(year)
        else { return nil }
        var rest = bytes[19...]
        var milliseconds: Int64 = 0
        if rest.first == UInt8(ascii: ".") {
            let digits = rest.dropFirst().prefix { (48...57).contains($0) }
            rest = rest.dropFirst(1 + digits.count)
            let three = (String(decoding: digits, as: UTF8.self) + "000").prefix(3)
            milliseconds = Int64(three) ?? 0
        }
        var offset: Int64 = 0
        let zone = Array(rest)
        if zone.count == 6, let hours = Int64(String(decoding: zone[1..<3], as: UTF8.self)),
            let minutes = Int64(String(decoding: zone[4..<6], as: UTF8.self))
        {
            offset = (zone[0] == UInt8(ascii: "-") ? -1 : 1) * (hours * 60 + minutes)
        } else if zone != [UInt8(ascii: "Z")] {
            return nil
        }
        // Days since 1970, with years that begin in March.
        let shifted = month > 2 ? year : year - 1
        let yearOfEra = shifted % 400
        let dayOfYear = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1
        let dayOfEra = yearOfEra * 365 + yearOfEra / 4 - yearOfEra / 100 + dayOfYear
        let days = shifted / 400 * 146_097 + dayOfEra - 719_468
        let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset * 60
        self.init(milliseconds: seconds * 1000 + milliseconds)
    }
}
