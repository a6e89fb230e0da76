import FlotillaProtocol
import MigrationModel

extension VMXCapture {
    mutating func captureNetwork() throws {
        let numbers = Set(file.entries.compactMap { Self.index(of: $0.key, prefix: "ethernet") }).sorted()
        for number in numbers {
            let key = "ethernet\(number)"
            guard try file.flag("\(key).present") ?? true else { continue }
            var nic = NIC()
            nic.id = "nic\(manifest.nics.count)"
            nic.model = model(key, nic.id)
            nic.macKind = file.text("\(key).addressType")?.lowercased() ?? ""
            // A static address stands in .address, one that VMware made up in .generatedAddress.
            let address =
                nic.macKind == "static" || nic.macKind == "vpx"
                ? file.text("\(key).address") ?? file.text("\(key).generatedAddress")
                : file.text("\(key).generatedAddress") ?? file.text("\(key).address")
            if let address {
                nic.mac = try normalizedMAC(address, owner: "\(file.name): \(key)")
            } else {
                manifest.note(nic.id, "\(key) has no MAC address yet; the target makes one up")
            }
            nic.network =
                file.text("\(key).networkName") ?? file.text("\(key).vnet") ?? file.text("\(key).connectionType") ?? ""
            nic.portgroupKey = file.text("\(key).dvs.portgroupId") ?? ""
            if nic.network.isEmpty && nic.portgroupKey.isEmpty {
                manifest.warn(
                    nic.id, "\(key) is connected to no network the VMX names",
                    remedy: "name its target network yourself")
            }
            nic.connected = try file.flag("\(key).startConnected") ?? true
            manifest.nics.append(nic)
        }
        try manifest.checkDistinctMACs(file.name)
    }

    private mutating func model(_ key: String, _ id: String) -> String {
        guard let device = file.text("\(key).virtualDev")?.lowercased() else {
            let model = manifest.vm.guestID.contains("64") ? "e1000" : "pcnet32"
            manifest.note(id, "\(key) states no model; taken as \(model), VMware's default for such a guest")
            return model
        }
        switch device {
        case "vlance", "flexible": return "pcnet32"
        case "vmxnet", "vmxnet2": return "vmxnet2"
        case "e1000", "e1000e", "vmxnet3": return device
        default:
            manifest.warn(
                id, "\(key) is of the unknown model '\(device.printable)'",
                remedy: "choose a model for the target, or change it to vmxnet3 on the source")
            return device
        }
    }

    /// 3 for `serial3.present` and the prefix "serial".
    static func index(of key: String, prefix: String) -> Int? {
        let lower = key.lowercased()
        guard lower.hasPrefix(prefix), let dot = lower.firstIndex(of: ".") else { return nil }
        let digits = lower[..<dot].dropFirst(prefix.count)
        guard !digits.isEmpty, digits.count <= 3, digits.allSatisfy({ $0.isASCII && $0.isNumber }) else { return nil }
        return Int(digits)
    }
}
