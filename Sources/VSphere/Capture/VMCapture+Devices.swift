import Export
import FlotillaProtocol
import MigrationModel

extension VMCapture {
    /// Passthrough devices and virtual GPUs, with the `pciPassthruN.*` keys of each, and the other keys that matter.
    mutating func captureAssignedDevices() throws {
        var groups: [Int: PassthroughKeys] = [:]
        for entry in content.items("config.extraConfig") {
            guard let key = entry.text("key"), let value = entry["value"]?.text else { continue }
            if let (index, name) = Manifest.passthroughKey(key) {
                groups[index, default: PassthroughKeys(label: "pciPassthru\(index)")].set(name, value)
            } else {
                manifest.keepExtraConfiguration(key, value)
            }
        }
        let host = inventory.host(content.reference("runtime.host")?.value)
        var found: [PassthroughKeys] = []
        var names: [String: String] = [:]
        for device in orderedDevices where device.type == "VirtualPCIPassthrough" {
            // Their keys count from 13000, the extra configuration's names from 0.
            let index = Int(clamping: max(0, device.number("key") ?? 13000) - 13000)
            var keys = PassthroughKeys(label: "pciPassthru\(index)")
            describe(device, host, &keys)
            // What the running configuration says of the device itself is stated better above.
            if let extra = groups[index] { keys.add(extra.settings) }
            found.append(keys)
            if let group = groupName(of: device) { names[keys.label] = group }
        }
        try manifest.assign(found)
        for index in manifest.gpus.indices {
            manifest.gpus[index].deviceGroup = names[manifest.gpus[index].label] ?? ""
        }
        for index in manifest.otherDevices.indices {
            manifest.otherDevices[index].deviceGroup = names[manifest.otherDevices[index].label] ?? ""
        }
    }

    private func describe(_ device: VIMNode, _ host: Infrastructure.Host?, _ keys: inout PassthroughKeys) {
        let backing = device["backing"]
        if let slot = device["slotInfo"]?.text("pciSlotNumber") { keys.set("pciSlotNumber", slot) }
        switch backing?.type {
        case "VirtualPCIPassthroughVmiopBackingInfo":
            keys.set("virtualDev", "vmiop")
            keys.set("vgpu", backing?.text("vgpu") ?? "")
            if let size = backing?.text("vgpuMigrateDataSizeMB") { keys.set("vgpuMigrateDataSizeMB", size) }
            if let flag = backing?.text("migrateSupported") { keys.set("migrateSupported", flag) }
        case "VirtualPCIPassthroughDvxBackingInfo":
            keys.set("virtualDev", "dvx")
            keys.set("dvx.deviceClass", backing?.text("deviceClass") ?? "")
            for option in backing?.all("configParams") ?? [] {
                if let key = option.text("key") { keys.set("dvx.config.\(key)", option["value"]?.text ?? "") }
            }
        case "VirtualPCIPassthroughDynamicBackingInfo":
            let allowed = (backing?.all("allowedDevice") ?? []).prefix(64).map { PciId($0) }
            keys.set("allowedDevices", allowed.map(Self.text).joined(separator: ","))
            if let label = backing?.text("customLabel") { keys.set("customLabel", label) }
            let assigned = backing?.text("assignedId")
            if let assigned { keys.set("assignedId", assigned) }
            let function =
                assigned.flatMap { host?.functions[PCIText.address($0) ?? $0] }
                // Of several that would do, each capture names the same.
                ?? host?.functions.sorted { $0.key < $1.key }.first { _, function in
                    allowed.contains { $0.vendor == function.id.vendor && $0.device == function.id.device }
                }?.value
            describe(function, backing?.text("deviceName"), &keys)
        default:
            let raw = backing?.text("id") ?? ""
            if !raw.isEmpty { keys.set("id", raw) }
            if let system = backing?.text("systemId") { keys.set("systemId", system) }
            if let vendor = unsigned16(backing?.text("vendorId")) { keys.set("vendorId", Self.hexadecimal(vendor)) }
            if let device = unsigned16(backing?.text("deviceId")) { keys.set("deviceId", Self.hexadecimal(device)) }
            describe(host?.functions[PCIText.address(raw) ?? raw], backing?.text("deviceName"), &keys)
            if let id = host?.functions[PCIText.address(raw) ?? raw]?.id {
                if id.subsystemVendor != 0 { keys.set("subVendorId", Self.hexadecimal(id.subsystemVendor)) }
                if id.subsystemDevice != 0 { keys.set("subDeviceId", Self.hexadecimal(id.subsystemDevice)) }
            }
        }
    }

    /// Class and name, which only the host knows for certain.
    private func describe(_ function: HostFunction?, _ name: String?, _ keys: inout PassthroughKeys) {
        if let name = name ?? function?.name, !name.isEmpty { keys.set("deviceName", name) }
        if let code = function?.classCode, code != 0 { keys.set("class", Self.hexadecimal(code)) }
    }

    private static func hexadecimal(_ number: UInt32) -> String { "0x\(PCIText.hexadecimal(number, 4))" }

    private static func text(_ id: PciId) -> String {
        var numbers = [id.vendor, id.device]
        if id.subsystemVendor != 0 || id.subsystemDevice != 0 || id.revision != 0 {
            numbers += [id.subsystemVendor, id.subsystemDevice]
        }
        if id.revision != 0 { numbers.append(id.revision) }
        return numbers.map(hexadecimal).joined(separator: ":")
    }

    /// Of a vendor's device group ("GPU + NIC"), which go together.
    private func groupName(of device: VIMNode) -> String? {
        guard let key = device["deviceGroupInfo"]?.number("groupInstanceKey") else { return nil }
        let group = content["config.deviceGroups"]?.all("deviceGroup").first { $0.number("groupInstanceKey") == key }
        return group?.text("deviceGroupName") ?? "group \(key)"
    }
}
