import FlotillaProtocol
import MigrationModel

extension OVFCapture {
    mutating func captureNetwork() throws {
        for item in items where item.kind == .ethernet {
            var nic = NIC()
            nic.id = "nic\(manifest.nics.count)"
            let network = item["Connection"] ?? ""
            nic.network = network
            nic.model = model(item, nic.id)
            nic.connected = item.automatic
            if let address = item["Address"] {
                nic.mac = try normalizedMAC(address, owner: "\(envelope.name): \(item.name.printable)")
                nic.macKind = "static"
            } else {
                manifest.note(
                    nic.id, "\(item.name.printable) has no MAC address in the OVF; the target makes one up")
            }
            if network.isEmpty {
                manifest.warn(
                    nic.id, "\(item.name.printable) is connected to no network",
                    remedy: "name its target network yourself")
            } else if !envelope.networks.contains(network) {
                manifest.warn(
                    nic.id, "\(item.name.printable)'s network \(network.printable) is not in the NetworkSection",
                    remedy: "check the network's name before you map it")
            }
            bootKeys[item.id] = "net:ethernet\(manifest.nics.count)"
            manifest.nics.append(nic)
        }
        try manifest.checkDistinctMACs(envelope.name)
    }

    private mutating func model(_ item: OVFItem, _ id: String) -> String {
        let first = item.subtype.split { $0 == " " || $0 == "," }.first.map(String.init) ?? ""
        switch first {
        case "vmxnet3", "e1000", "e1000e", "pcnet32", "vmxnet2": return first
        case "vmxnet": return "vmxnet2"
        case "vlance", "flexible": return "pcnet32"
        case let text where text.contains("sriov"): return "sriov"
        case "":
            manifest.note(id, "\(item.name.printable) states no model; taken as e1000")
            return "e1000"
        default:
            manifest.warn(
                id, "\(item.name.printable) is of the unknown model '\(first.printable)'",
                remedy: "choose a model for the target, or change it to VmxNet3 on the source")
            return first
        }
    }

    mutating func capturePorts() throws {
        for item in items {
            switch item.kind {
            case .floppy, .cd, .dvd:
                var removable = Removable()
                removable.kind = item.kind == .floppy ? .floppy : .cdrom
                removable.backing = item.hostResources.first ?? ""
                removable.connected = item.automatic
                manifest.vm.removables.append(removable)
                bootKeys[item.id] = item.kind == .floppy ? "floppy" : "cdrom"
                if !removable.backing.isEmpty {
                    manifest.note("vm", "\(item.name.printable) holds '\(removable.backing.printable)'; not carried")
                }
            case .serial:
                var port = SerialPort()
                port.backingKind =
                    ["file", "pipe", "network", "uri"].first { item.subtype.contains($0) }
                    .map { $0 == "uri" ? "network" : $0 } ?? "device"
                port.backing = item.hostResources.first ?? item.setting("backing.fileName") ?? ""
                manifest.vm.serialPorts.append(port)
            case .graphics:
                if let text = item.setting("videoRamSizeInKB") {
                    guard let size = UInt64(text) else {
                        throw MigrationError(
                            .invalidArgument, "\(envelope.name): videoRamSizeInKB '\(text.printable)' is not a number")
                    }
                    manifest.vm.videoMemoryBytes = try checkedBytes(size, times: 1024, "\(envelope.name): video memory")
                }
                if item.setting("enable3DSupport")?.asFlag == true {
                    manifest.extraConfig["mks.enable3d"] = "TRUE"
                    if item.setting("use3dRenderer")?.lowercased() == "hardware" {
                        manifest.warn(
                            "vm", "its display used the host's GPU for 3D (vSGA), which the target has no equal of",
                            remedy: "give it a vGPU or a GPU if its programs need one")
                    }
                }
            default: break
            }
        }
    }

    /// Passthrough items, the `pciPassthruN` keys of the extra configuration, the TPM, and what nobody knows.
    mutating func captureDevices() throws {
        var groups: [Int: PassthroughKeys] = [:]
        for (key, value) in hardware.vmwareSettings("ExtraConfig") {
            guard let (index, key) = Manifest.passthroughKey(key) else { continue }
            groups[index, default: PassthroughKeys(label: "pciPassthru\(index)")].set(key, value)
        }
        var devices: [PassthroughKeys] = []
        for item in items {
            if item.subtype.contains("tpm") {
                manifest.vm.tpm = true
                manifest.warn(
                    "vm", "its virtual TPM's secrets can't be carried; the target gets an empty TPM 2.0",
                    remedy: "have recovery keys (BitLocker, LUKS) at hand, or suspend the encryption before moving")
            } else if item.subtype.contains("pcipassthrough") || item.subtype.contains("vgpu") {
                devices.append(passthrough(item))
            } else if item.kind == nil || item.kind == .other, !Self.isImplied(item.subtype) {
                manifest.warn(
                    "vm",
                    "its device \(item.name.printable) (type \(item.type) '\(item.subtype.printable)') is not "
                        + "carried", remedy: "check that the VM works without it")
            }
        }
        // Extra configuration describes the same devices once more, by number; what they are, items say better.
        let described = devices.count
        for (index, keys) in groups.sorted(by: { $0.key < $1.key }) {
            if index < described {
                devices[index].add(keys.settings)
            } else {
                devices.append(keys)
            }
        }
        try manifest.assign(devices)
    }

    private func passthrough(_ item: OVFItem) -> PassthroughKeys {
        var keys = PassthroughKeys(label: item.name)
        keys.set("present", "TRUE")
        for (key, value) in item.settings {
            let short = key.lowercased().hasPrefix("backing.") ? String(key.dropFirst("backing.".count)) : key
            keys.set(short == "slotInfo.pciSlotNumber" ? "pciSlotNumber" : short, value)
        }
        if let profile = item.hostResources.first, item.subtype.contains("vgpu") || item.subtype.contains("vmiop") {
            keys.set("vgpu", profile)
        }
        if item.subtype.contains("vmiop") || item.subtype.contains("vgpu") { keys.set("virtualDev", "vmiop") }
        if item.subtype.contains("dvx") { keys.set("virtualDev", "dvx") }
        return keys
    }

    /// Devices every VMware VM has and every target brings along.
    private static func isImplied(_ subtype: String) -> Bool {
        ["vmci", "keyboard", "pointing", "mouse", "pci.controller", "ps2", "sio", "hdaudio", "soundcard"]
            .contains { subtype.contains($0) }
    }
}
