import FlotillaProtocol
import MigrationModel

/// Reads HyperSDK's Artifact Manifest 1.0. It knows no GPUs, UUIDs, controllers or network card models: what a VM had
/// of these isn't in it, and a note says so.
struct HyperSDKReader {
    private(set) var problems: [ManifestProblem] = []
    private var manifest = Manifest()

    /// Its names for formats, and qemu-img's.
    static let formats = [
        "vmdk": "vmdk", "raw": "raw", "qcow2": "qcow2", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi",
    ]

    mutating func read(_ tree: JSONTree) -> Manifest {
        let version = text(tree, "manifest_version", "")
        if version != "1.0" {
            add("manifest_version", "'\(version.printable)' is not 1.0, the version that is known", "export it as 1.0")
        }
        closed(
            tree, "",
            [
                "manifest_version", "source", "vm", "disks", "nics", "notes", "warnings", "metadata", "pipeline",
                "configuration", "output", "options",
            ])
        manifest.schemaVersion = ManifestFile.schemaVersion
        readSource(tree["source"])
        readMachine(tree["vm"])
        readDisks(tree["disks"])
        readNetwork(tree["nics"])
        readRemarks(tree)
        if manifest.vm.name.isEmpty { manifest.vm.name = "imported-vm" }
        manifest.note(
            "vm",
            "an Artifact Manifest states no GPUs, UUIDs, disk controllers and TPM: what it had of these is unknown",
            remedy: "capture the VM at its source if it had any")
        return manifest
    }

    private mutating func readSource(_ source: JSONTree?) {
        guard let source = object(source, "source") else { return }
        closed(
            source, "source",
            ["provider", "vm_id", "vm_name", "datacenter", "export_timestamp", "export_method"])
        manifest.vm.name = text(source, "vm_name", "source")
        manifest.source.vmMoid = text(source, "vm_id", "source")
        manifest.source.datacenter = text(source, "datacenter", "source")
        let provider = text(source, "provider", "source")
        if !provider.isEmpty { manifest.extraConfig["hypersdk.provider"] = provider }
        let method = text(source, "export_method", "source")
        if !method.isEmpty { manifest.extraConfig["hypersdk.export_method"] = method }
    }

    private mutating func readMachine(_ vm: JSONTree?) {
        guard let vm = object(vm, "vm") else {
            add("vm", "is missing: nothing tells CPUs and memory", "add vm with cpu and mem_gb")
            return
        }
        closed(vm, "vm", ["cpu", "mem_gb", "firmware", "secureboot", "os_hint", "os_version"])
        let cpus = number(vm, "cpu", "vm") ?? 0
        let memory = number(vm, "mem_gb", "vm") ?? 0
        if !(1...4096).contains(cpus) { add("vm.cpu", "\(cpus) is no number of CPUs", "write 1 to 4096") }
        if !(1...65_536).contains(memory) { add("vm.mem_gb", "\(memory) is no memory size", "write 1 to 65536 GiB") }
        manifest.vm.cpu.count = UInt32(clamping: cpus)
        manifest.vm.cpu.coresPerSocket = 1
        manifest.vm.memory.bytes = UInt64(clamping: min(memory, 65_536)) << 30
        switch text(vm, "firmware", "vm") {
        case "uefi", "efi": manifest.vm.firmware = .efi
        case "bios", "": manifest.vm.firmware = .bios
        case "unknown":
            manifest.vm.firmware = .bios
            manifest.warn(
                "vm", "its firmware is not known and taken as BIOS",
                remedy: "set vm.firmware in the manifest to uefi if it boots with EFI")
        case let other:
            add("vm.firmware", "'\(other.printable)' is not one of bios, uefi, unknown", "write one of them")
        }
        manifest.vm.secureBoot = flag(vm, "secureboot", "vm")
        if manifest.vm.secureBoot, manifest.vm.firmware == .bios {
            add("vm.secureboot", "Secure Boot needs the firmware uefi", "set vm.firmware to uefi")
        }
        manifest.vm.guestFullName = text(vm, "os_version", "vm")
        switch text(vm, "os_hint", "vm").lowercased() {
        case "windows": manifest.vm.tools.family = "windowsGuest"
        case "linux": manifest.vm.tools.family = "linuxGuest"
        default: break
        }
    }

    private mutating func readDisks(_ list: JSONTree?) {
        guard case .array(let items)? = list, !items.isEmpty else {
            return add("disks", "has to be a list with at least one disk", "add the VM's disks")
        }
        guard items.count <= 256 else { return add("disks", "\(items.count) are more than any VM has", "remove some") }
        var disks: [(hint: Int64, disk: Disk)] = []
        var seen: Set<String> = []
        for (index, item) in items.enumerated() {
            let path = "disks[\(index)]"
            guard let item = object(item, path) else { continue }
            closed(
                item, path,
                [
                    "id", "source_format", "bytes", "local_path", "checksum", "boot_order_hint", "label", "disk_type",
                ])
            var disk = Disk()
            let id = text(item, "id", path)
            let named = id.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "_" || $0 == "-") }
            if id.isEmpty || !named {
                add("\(path).id", "'\(id.printable)' is no id", "write letters, digits, '_' and '-'")
            } else if !seen.insert(id).inserted {
                add("\(path).id", "'\(id)' is there twice", "give each disk its own id")
            }
            let label = text(item, "label", path)
            disk.label = label.isEmpty ? id : label
            let format = text(item, "source_format", path)
            disk.source.format = Self.formats[format] ?? ""
            if disk.source.format.isEmpty {
                add(
                    "\(path).source_format", "'\(format.printable)' is not one of vmdk, qcow2, raw, vhd, vhdx, vdi",
                    "write one of them")
            }
            disk.source.path = text(item, "local_path", path)
            if disk.source.path.isEmpty { add("\(path).local_path", "is missing", "write where the disk's file lies") }
            let bytes = number(item, "bytes", path)
            if let bytes, bytes >= 0 {
                disk.source.length = UInt64(bytes)
            } else {
                add("\(path).bytes", "has to be a size in bytes", "write the size of the disk's file")
            }
            readChecksum(item, path, &disk)
            disk.mode = "persistent"
            let kind = text(item, "disk_type", path)
            if !["boot", "data", "unknown", ""].contains(kind) {
                add("\(path).disk_type", "'\(kind.printable)' is not one of boot, data, unknown", "write one of them")
            }
            disk.boot = kind == "boot"
            // Their writer leaves a 0 out, their text calls 999 the default.
            let hint = number(item, "boot_order_hint", path) ?? (kind == "data" ? 999 : 0)
            if hint < 0 { add("\(path).boot_order_hint", "\(hint) is negative", "write 0 for the first disk") }
            disks.append((hint, disk))
        }
        let order = disks.enumerated().sorted {
            ($0.element.hint, $0.offset) < ($1.element.hint, $1.offset)
        }
        for (number, entry) in order.enumerated() {
            var disk = entry.element.disk
            disk.id = "disk\(number)"
            disk.controller = .pvscsi
            disk.busNumber = UInt32(number / 15)
            // Unit 7 is the controller's own.
            disk.unitNumber = UInt32(number % 15 < 7 ? number % 15 : number % 15 + 1)
            manifest.disks.append(disk)
        }
    }

    private mutating func readChecksum(_ item: JSONTree, _ path: String, _ disk: inout Disk) {
        let checksum = text(item, "checksum", path)
        guard !checksum.isEmpty else { return }
        let hex = checksum.dropFirst("sha256:".count)
        guard checksum.hasPrefix("sha256:"), hex.count == 64, hex.allSatisfy({ $0.isASCII && $0.isHexDigit }) else {
            return add(
                "\(path).checksum", "'\(checksum.printable)' is not sha256: and 64 hexadecimal digits",
                "write the file's SHA-256, or leave it out")
        }
        var digest = ExpectedDigest()
        digest.algorithm = "sha256"
        digest.hex = hex.lowercased()
        disk.source.expected = [digest]
    }

    private mutating func readNetwork(_ list: JSONTree?) {
        guard let list, list != .null else { return }
        guard case .array(let items) = list, items.count <= 64 else {
            return add("nics", "has to be a list of at most 64 network cards", "correct it")
        }
        for (index, item) in items.enumerated() {
            let path = "nics[\(index)]"
            guard let item = object(item, path) else { continue }
            closed(item, path, ["id", "mac", "network"])
            var nic = NIC()
            nic.id = "nic\(index)"
            nic.model = "vmxnet3"
            nic.network = text(item, "network", path)
            nic.connected = true
            let mac = text(item, "mac", path)
            if !mac.isEmpty {
                do { nic.mac = try normalizedMAC(mac, owner: path) } catch {
                    add("\(path).mac", "'\(mac.printable)' is no interface's MAC address", "write xx:xx:xx:xx:xx:xx")
                }
                if manifest.nics.contains(where: { $0.mac == nic.mac }) {
                    add("\(path).mac", "\(nic.mac) is there twice", "give each card its own address")
                }
            }
            manifest.nics.append(nic)
        }
    }

    private mutating func readRemarks(_ tree: JSONTree) {
        if case .array(let notes)? = tree["notes"] {
            for case .string(let text) in notes.prefix(64) { manifest.note("source", "exporter: \(text.printable)") }
        }
        if case .array(let warnings)? = tree["warnings"] {
            for warning in warnings.prefix(64) {
                guard case .string(let message)? = warning["message"] else { continue }
                manifest.warn(
                    "source", "exporter: \(message.printable)", remedy: "look at it where the VM was exported")
            }
        }
        for key in ["pipeline", "configuration", "output", "options"] where tree[key] != nil {
            manifest.note("source", "'\(key)' instructs another program and is not followed")
        }
    }

    // MARK: Fields

    private mutating func add(_ path: String, _ message: String, _ remedy: String) {
        if problems.count < 200 { problems.append(ManifestProblem(path, message, remedy)) }
    }

    private mutating func closed(_ tree: JSONTree, _ path: String, _ known: Set<String>) {
        guard case .object(let members) = tree else { return }
        for member in members where !known.contains(member.key) {
            add(
                path.isEmpty ? member.key.printable : "\(path).\(member.key.printable)",
                "is not a field of an Artifact Manifest 1.0",
                "remove it; known here are \(known.sorted().joined(separator: ", "))")
        }
    }

    private mutating func object(_ tree: JSONTree?, _ path: String) -> JSONTree? {
        guard let tree, tree != .null else { return nil }
        if case .object = tree { return tree }
        add(path, "\(tree.shown) is not an object", "write an object")
        return nil
    }

    private mutating func text(_ tree: JSONTree, _ key: String, _ path: String) -> String {
        switch tree[key] {
        case nil, .null: return ""
        case .string(let text) where text.utf8.count <= 4096 && !text.utf8.contains(0): return text
        // YAML's plain 1.0 and 22.04 are numbers to a parser and texts to their writers.
        case .number(let text): return text
        case let other?:
            add(path.isEmpty ? key : "\(path).\(key)", "\(other.shown) is not a text", "write a text")
            return ""
        }
    }

    private mutating func number(_ tree: JSONTree, _ key: String, _ path: String) -> Int64? {
        switch tree[key] {
        case nil, .null: return nil
        case .number(let text):
            if let number = Int64(text) { return number }
            fallthrough
        default:
            add("\(path).\(key)", "\(tree[key]?.shown ?? "") is not a whole number", "write a whole number")
            return nil
        }
    }

    private mutating func flag(_ tree: JSONTree, _ key: String, _ path: String) -> Bool {
        switch tree[key] {
        case nil, .null: return false
        case .bool(let flag): return flag
        case let other?:
            add("\(path).\(key)", "\(other.shown) is neither true nor false", "write true or false")
            return false
        }
    }
}
