import FlotillaProtocol
import MigrationModel

/// The `pciPassthruN.*` keys of one device, without that prefix, and what they say. VMX files and the extra
/// configuration of an OVF share them.
package struct PassthroughKeys {
    /// "pciPassthru0", or what the source calls the device.
    package let label: String
    /// Lower-case key to value.
    private var values: [String: String] = [:]
    private var written: [(key: String, value: String)] = []
    private var consumed: Set<String> = []

    package init(label: String) { self.label = label }

    package var isEmpty: Bool { written.isEmpty }

    /// Of a message: "pciSlotNumber, cfg.enable_uvm".
    private var keys: String { written.map(\.key).joined(separator: ", ").printable }

    package mutating func set(_ key: String, _ value: String) {
        if values.updateValue(value, forKey: key.lowercased()) != nil {
            written.removeAll { $0.key.lowercased() == key.lowercased() }
        }
        written.append((key, value))
    }

    /// Takes over the keys of `other` that are not set yet.
    package mutating func add(_ other: PassthroughKeys) {
        for (key, value) in other.written where values[key.lowercased()] == nil { set(key, value) }
    }

    private static let identity: Set<String> = [
        "present", "id", "deviceid", "vendorid", "systemid", "subvendorid", "subdeviceid", "revisionid",
        "class", "devicename", "alloweddevices", "customlabel", "assignedid", "virtualdev", "vgpu",
    ]

    /// Without the keys that say which device it is.
    package var settings: PassthroughKeys {
        var rest = PassthroughKeys(label: label)
        for (key, value) in written where !Self.identity.contains(key.lowercased()) { rest.set(key, value) }
        return rest
    }

    /// Whether they say that there is a device, and not only how one that was there is to be treated.
    private var nameADevice: Bool {
        values.keys.contains { Self.identity.contains($0) || $0 == "pfid" || $0.hasPrefix("dvx.") }
    }

    /// Nil for a device that isn't there (`present = FALSE`) or keys that describe none.
    mutating func device(findings manifest: inout Manifest) -> (device: AssignedDevice, kind: GPUKind)? {
        guard nameADevice else {
            manifest.note(
                label,
                "\(label) is no device: the source only has settings of it (\(settings.keys)), which are not carried")
            return nil
        }
        if take("present")?.asFlag == false {
            manifest.note(label, "\(label) is switched off on the source (present = FALSE) and not carried")
            return nil
        }
        var device = AssignedDevice()
        device.label = label
        device.name = take("deviceName") ?? ""
        if let slot = take("pciSlotNumber") { device.guestSlot = Int32(slot) ?? -1 }
        device.msiEnabled = take("msiEnabled")?.asFlag ?? false
        if let text = take("class") {
            device.classCode = PCIText.classCode(text) ?? 0
            if device.classCode == 0 { undecoded("class", text, &manifest) }
        }
        let kind = setBacking(of: &device, findings: &manifest)
        for (key, value) in written where !consumed.contains(key.lowercased()) { device.config[key] = value }
        return (device, kind)
    }

    private mutating func setBacking(of device: inout AssignedDevice, findings manifest: inout Manifest) -> GPUKind {
        let virtualDevice = take("virtualDev")?.lowercased() ?? ""
        let profile = take("vgpu") ?? ""
        let isDVX = virtualDevice == "dvx" || values.keys.contains { $0.hasPrefix("dvx.") }
        if isDVX {
            device.dvx.deviceClass = take("dvx.deviceClass") ?? ""
            for (key, value) in written where key.lowercased().hasPrefix("dvx.config.") {
                device.dvx.parameters[String(key.dropFirst("dvx.config.".count))] = value
                consumed.insert(key.lowercased())
            }
            return .gpu
        }
        if virtualDevice == "vmiop" || !profile.isEmpty {
            device.vgpu.profile = profile
            if let size = take("vgpuMigrateDataSizeMB").flatMap({ UInt64($0) }),
                let bytes = try? checkedBytes(size, times: 1 << 20, label)
            {
                device.vgpu.migrateDataBytes = bytes
            }
            device.vgpu.migrateSupported = take("migrateSupported")?.asFlag ?? false
            return .gpu
        }
        let id = identifiers(&manifest)
        if value("allowedDevices") != nil || value("customLabel") != nil {
            device.dynamic.allowed = allowedDevices(&manifest)
            device.dynamic.customLabel = take("customLabel") ?? ""
            device.dynamic.assignedAddress = take("assignedId").flatMap { PCIText.address($0) } ?? ""
            let kinds = device.dynamic.allowed.map { GPUKind(classCode: device.classCode, id: $0) }
            if kinds.isEmpty { return GPUKind(classCode: device.classCode, id: id) }
            return kinds.contains(.gpu) ? .gpu : kinds.contains(.unknown) ? .unknown : .other
        }
        let raw = take("id") ?? ""
        let system = take("systemId") ?? ""
        let physicalFunction = take("pfId") ?? ""
        if system.uppercased() == "BYPASS" || !physicalFunction.isEmpty {
            device.sriov.id = id
            device.sriov.rawAddress = raw
            device.sriov.physicalFunction = PCIText.address(physicalFunction) ?? physicalFunction
            device.sriov.portgroupKey = take("dvs.portgroupId") ?? ""
        } else {
            device.passthrough.id = id
            device.passthrough.rawAddress = raw
            device.passthrough.address = PCIText.address(raw) ?? ""
            device.passthrough.systemID = system
            if !raw.isEmpty && device.passthrough.address.isEmpty {
                manifest.note(
                    label, "\(label): the address '\(raw.printable)' can be read as more than one device; kept as text")
            } else if raw.isEmpty && id.vendor == 0 {
                manifest.warn(
                    label, "\(label) names no device: neither an address nor a vendor, profile or label",
                    remedy: "map it to a device of the target by hand, or remove it on the source")
            }
        }
        return GPUKind(classCode: device.classCode, id: id)
    }

    private mutating func identifiers(_ manifest: inout Manifest) -> PciId {
        var id = PciId()
        let fields: [(String, WritableKeyPath<PciId, UInt32>)] = [
            ("vendorId", \.vendor), ("deviceId", \.device), ("subVendorId", \.subsystemVendor),
            ("subDeviceId", \.subsystemDevice), ("revisionId", \.revision),
        ]
        for (key, path) in fields {
            guard let text = value(key), !text.isEmpty else { continue }
            guard let number = PCIText.identifier(text) else {
                undecoded(key, text, &manifest)
                continue
            }
            consumed.insert(key.lowercased())
            id[keyPath: path] = number
        }
        return id
    }

    /// `0x10de:0x20f1`, several separated by commas, semicolons or spaces; subsystem ids and revision may follow.
    private mutating func allowedDevices(_ manifest: inout Manifest) -> [PciId] {
        guard let text = take("allowedDevices") else { return [] }
        var ids: [PciId] = []
        for entry in text.split(whereSeparator: { $0 == "," || $0 == ";" || $0.isWhitespace }).prefix(64) {
            let numbers = entry.split(separator: ":", omittingEmptySubsequences: false)
                .map { PCIText.identifier(String($0)) }
            guard (2...5).contains(numbers.count), let vendor = numbers[0], let device = numbers[1] else {
                undecoded("allowedDevices", String(entry), &manifest)
                continue
            }
            var id = PciId()
            id.vendor = vendor
            id.device = device
            if numbers.count > 2 { id.subsystemVendor = numbers[2] ?? 0 }
            if numbers.count > 3 { id.subsystemDevice = numbers[3] ?? 0 }
            if numbers.count > 4 { id.revision = numbers[4] ?? 0 }
            ids.append(id)
        }
        return ids
    }

    private mutating func undecoded(_ key: String, _ text: String, _ manifest: inout Manifest) {
        consumed.remove(key.lowercased())
        manifest.warn(
            label, "\(label).\(key) = '\(text.printable)' is not a number of one certain base; kept as text",
            remedy: "write it as 0x… in the source's configuration")
    }

    private func value(_ key: String) -> String? { values[key.lowercased()] }

    private mutating func take(_ key: String) -> String? {
        consumed.insert(key.lowercased())
        return value(key)
    }
}
