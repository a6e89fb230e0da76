import Export
import FlotillaProtocol
import MigrationModel

extension VMCapture {
    private static let models = [
        "VirtualVmxnet3": "vmxnet3", "VirtualVmxnet3Vrdma": "vmxnet3", "VirtualE1000e": "e1000e",
        "VirtualE1000": "e1000", "VirtualPCNet32": "pcnet32", "VirtualVmxnet2": "vmxnet2", "VirtualVmxnet": "vmxnet2",
        "VirtualSriovEthernetCard": "sriov",
    ]

    mutating func captureNetwork() {
        for device in orderedDevices {
            guard let model = Self.models[device.type] else { continue }
            var nic = NIC()
            nic.id = "nic\(manifest.nics.count)"
            nic.model = model
            nic.macKind = device.text("addressType")?.lowercased() ?? ""
            if let address = device.text("macAddress") {
                do {
                    nic.mac = try normalizedMAC(address, owner: nic.id)
                } catch {
                    manifest.warn(
                        nic.id, "'\(address.printable)' is no MAC address of one interface; the target makes one up",
                        remedy: "correct the MAC address on the source")
                }
            } else {
                manifest.note(nic.id, "it has no MAC address yet; the target makes one up")
            }
            nic.connected =
                device["connectable"]?.flag(
                    manifest.vm.powerState == .poweredOn ? "connected" : "startConnected") ?? true
            nameNetwork(of: &nic, device["backing"])
            if let key = device.number("key") {
                labels[key] = "ethernet\(max(4000, key) - 4000)"
                nic.addresses = addresses(of: key, mac: nic.mac)
            }
            if model == "sriov" {
                manifest.warn(
                    nic.id,
                    "it is an SR-IOV network function; it becomes an ordinary network card with its MAC address",
                    remedy: "map its network, or assign a virtual function of the target by hand")
            }
            if device.type == "VirtualVmxnet3Vrdma" {
                manifest.warn(
                    nic.id, "it is an RDMA adapter; the target gets an ordinary network card",
                    remedy: "expect no RDMA in the guest")
            }
            manifest.nics.append(nic)
        }
        var owners: [String: String] = [:]
        for nic in manifest.nics where !nic.mac.isEmpty {
            if let other = owners.updateValue(nic.id, forKey: nic.mac) {
                manifest.block(
                    nic.id, "\(other) and \(nic.id) have the same MAC address \(nic.mac)",
                    remedy: "give one of them another address on the source")
            }
        }
    }

    private mutating func nameNetwork(of nic: inout NIC, _ backing: VIMNode?) {
        switch backing?.type {
        case "VirtualEthernetCardDistributedVirtualPortBackingInfo":
            nic.portgroupKey = backing?["port"]?.text("portgroupKey") ?? ""
            nic.network = inventory.portgroup(nic.portgroupKey)?.name ?? ""
        case "VirtualEthernetCardOpaqueNetworkBackingInfo":
            let id = backing?.text("opaqueNetworkId") ?? ""
            nic.network = inventory.network(id)?.name ?? id
        default:
            nic.network =
                inventory.network(backing?.reference("network")?.value)?.name ?? backing?.text("deviceName") ?? ""
        }
        if nic.network.isEmpty {
            nic.network = nic.portgroupKey
            manifest.warn(
                nic.id, "its network has no name that the account sees", remedy: "name its target network yourself")
        }
    }

    /// Those VMware Tools report, for keeping static ones.
    private func addresses(of key: Int64, mac: String) -> [GuestAddress] {
        let cards = content.items("guest.net").enumerated().filter { _, entry in
            if let device = entry.number("deviceConfigId"), device > 0 { return device == key }
            return !mac.isEmpty && entry.text("macAddress")?.lowercased() == mac
        }
        let routes = content.items("guest.ipStack").flatMap { $0["ipRouteConfig"]?.all("ipRoute") ?? [] }
        var addresses: [GuestAddress] = []
        for (index, entry) in cards.prefix(16) {
            let servers = entry["dnsConfig"]?.all("ipAddress").map(\.text) ?? []
            for item in (entry["ipConfig"]?.all("ipAddress") ?? []).prefix(256) {
                guard let ip = item.text("ipAddress") else { continue }
                var address = GuestAddress()
                address.ip = ip
                address.prefixLength = UInt32(clamping: item.number("prefixLength") ?? 0)
                address.origin = item.text("origin")?.lowercased() ?? ""
                address.dns = servers
                address.gateway = Self.gateway(for: address, of: index, routes)
                addresses.append(address)
            }
        }
        return addresses
    }

    /// The gateway of a default route of the address's family: one in its subnet, else one that is said to be reached
    /// through its card. IPv6 routers are mostly known by link-local addresses, which tell no subnet.
    ///
    /// - Parameter card: index in `guest.net`, which routes name as their device.
    static func gateway(for address: GuestAddress, of card: Int, _ routes: [VIMNode]) -> String {
        guard address.origin != "linklayer", let own = IPAddress(address.ip) else { return "" }
        var throughCard = ""
        for route in routes where route.number("prefixLength") == 0 {
            guard let network = route.text("network").flatMap({ IPAddress($0) }), network.isUnspecified,
                network.bytes.count == own.bytes.count, let text = route["gateway"]?.text("ipAddress"),
                let gateway = IPAddress(text)
            else { continue }
            if gateway.shares(prefix: address.prefixLength, with: own) { return text }
            if throughCard.isEmpty, route["gateway"]?.text("device") == "\(card)" { throughCard = text }
        }
        return throughCard
    }
}
