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
            keys.set("present", "TRUE")
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

    private mutating func describe(
        _ device: VIMNode, _ host: Infrastructure.Host?, _ keys: inout PassthroughKeys
    ) {
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
            describe(function(of: host, at: assigned, allowed), backing?.text("deviceName"), &keys)
        default:
            let raw = backing?.text("id") ?? ""
            if !raw.isEmpty { keys.set("id", raw) }
            if let system = backing?.text("systemId") { keys.set("systemId", system) }
            var wanted = PciId()
            wanted.vendor = unsigned16(backing?.text("vendorId")) ?? 0
            wanted.device = unsigned16(backing?.text("deviceId")) ?? 0
            if wanted.vendor != 0 { keys.set("vendorId", Self.hexadecimal(wanted.vendor)) }
            if wanted.device != 0 { keys.set("deviceId", Self.hexadecimal(wanted.device)) }
            let function = function(of: host, at: raw, wanted.vendor == 0 ? [] : [wanted])
            if let host, function == nil, !host.functions.isEmpty {
                manifest.warn(
                    keys.label,
                    "\(keys.label): its host \(host.name.printable) has no device \(Self.text(wanted)); only the host "
                        + "knows its class", remedy: "assign the device on the source again, or remove it there")
            }
            describe(function, backing?.text("deviceName"), &keys)
            if let id = function?.id {
                if id.subsystemVendor != 0 { keys.set("subVendorId", Self.hexadecimal(id.subsystemVendor)) }
                if id.subsystemDevice != 0 { keys.set("subDeviceId", Self.hexadecimal(id.subsystemDevice)) }
            }
        }
    }

    /// The function at an address, if it is one of the wanted. Else another that is: addresses change with the host's
    /// slots and with the host, and what is there by now may be something else.
    private func function(of host: Infrastructure.Host?, at address: String?, _ wanted: [PciId]) -> HostFunction? {
        func isWanted(_ function: HostFunction) -> Bool {
            wanted.contains { $0.vendor == function.id.vendor && $0.device == function.id.device }
        }
        if let function = address.flatMap({ host?.functions[PCIText.address($0) ?? $0] }),
            wanted.isEmpty || isWanted(function)
        {
            return function
        }
        // Of several that would do, each capture names the same.
        return host?.functions.sorted { $0.key < $1.key }.first { isWanted($0.value) }?.value
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
