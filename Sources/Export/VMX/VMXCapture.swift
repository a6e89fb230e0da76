import FlotillaProtocol
import HostKit
import MigrationModel

/// Turns a VMX file and the descriptors beside it into a manifest.
struct VMXCapture {
    let file: VMXFile
    let folder: SourceFolder
    /// The VMX file's own name.
    let name: String
    var manifest = Manifest()

    init(_ bytes: [UInt8], path: String) throws {
        file = try VMXFile(bytes, name: path)
        folder = SourceFolder(path: Files.parent(of: path))
        name = Files.name(of: path)
        if file["encryption.keySafe"] != nil || file["encryption.data"] != nil {
            throw MigrationError(
                .failedPrecondition, "\(path): the VM is encrypted (encryption.keySafe)",
                hint: "decrypt the VM on the source, or export it to an OVA there")
        }
    }

    mutating func run(_ stop: StopFlag) throws -> Manifest {
        try captureMachine()
        try captureProcessors()
        try captureMemory()
        try captureState()
        try captureDisks(stop)
        try captureNetwork()
        try capturePorts()
        captureBootOrder()
        try captureDevices()
        return manifest
    }

    private mutating func captureMachine() throws {
        guard let displayName = file.text("displayName") ?? stem(of: name) else {
            throw MigrationError(.invalidArgument, "\(file.name): has no displayName")
        }
        manifest.vm.name = displayName
        for (key, path) in [
            ("vc.uuid", \VirtualMachine.instanceUuid), ("uuid.bios", \VirtualMachine.biosUuid),
        ] {
            guard let text = file.text(key) else { continue }
            guard let uuid = text.canonicalUUID else { throw file.invalid(key, "is not a UUID") }
            manifest.vm[keyPath: path] = uuid
        }
        if let guest = file.text("guestOS") {
            manifest.vm.guestID = VMXGuest.identifier(guest)
        } else {
            manifest.note("vm", "the VMX names no guest operating system")
        }
        manifest.vm.guestFullName =
            VMXGuest.prettyName(file["guestOS.detailed.data"] ?? "")
            ?? VMXGuest.prettyName(file["guestInfo.detailed.data"] ?? "") ?? ""
        if let version = try file.number("virtualHW.version") { manifest.vm.hardwareVersion = "vmx-\(version)" }
        switch file.text("firmware")?.lowercased() {
        case nil, "bios": manifest.vm.firmware = .bios
        case "efi": manifest.vm.firmware = .efi
        default: throw file.invalid("firmware", "is neither bios nor efi")
        }
        manifest.vm.secureBoot = try file.flag("uefi.secureBoot.enabled") ?? false
        manifest.vm.changeTracking = try file.flag("ctkEnabled") ?? false
        manifest.vm.annotation = file["annotation"] ?? ""
        if try file.flag("vtpm.present") == true || file.flag("managedVM.autoAddVTPM") == true {
            manifest.vm.tpm = true
            manifest.warn(
                "vm", "its virtual TPM's secrets can't be carried; the target gets an empty TPM 2.0",
                remedy: "have recovery keys (BitLocker, LUKS) at hand, or suspend the encryption before moving")
        }
        if let size = try file.number("svga.vramSize") { manifest.vm.videoMemoryBytes = size }
    }

    private mutating func captureProcessors() throws {
        let count = try small("numvcpus", 1...4096) ?? 1
        var cores = try small("cpuid.coresPerSocket", 1...4096) ?? 1
        if count % cores != 0 {
            manifest.warn(
                "vm", "\(count) CPUs are no multiple of \(cores) cores per socket; carried with one core per socket",
                remedy: "correct cpuid.coresPerSocket on the source if the guest counts sockets")
            cores = 1
        }
        manifest.vm.cpu.count = count
        manifest.vm.cpu.coresPerSocket = cores
        manifest.vm.cpu.reservationMhz = try file.number("sched.cpu.min") ?? 0
        manifest.vm.cpu.limitMhz = try limit("sched.cpu.max")
        manifest.vm.cpu.shares = try shares("sched.cpu.shares", normal: 1000, units: UInt64(count))
        manifest.vm.cpu.hotAdd = try file.flag("vcpu.hotadd") ?? false
        manifest.vm.cpu.hotRemove = try file.flag("vcpu.hotremove") ?? false
        if let nodes = file.text("numa.nodeAffinity"), nodes.lowercased() != "all" {
            manifest.vm.cpu.numaNodes = try nodes.split(separator: ",").prefix(256).map {
                guard let node = UInt32(String($0).trimmed) else {
                    throw file.invalid("numa.nodeAffinity", "is not a list of NUMA nodes")
                }
                return node
            }
        }
        let perNode = try small("cpuid.coresPerNumaNode", 0...4096) ?? small("numa.vcpu.maxPerVirtualNode", 0...4096)
        manifest.vm.cpu.vnumaCoresPerNode = perNode ?? 0
    }

    private mutating func captureMemory() throws {
        guard let megabytes = try file.number("memsize"), megabytes > 0 else {
            throw MigrationError(.invalidArgument, "\(file.name): has no usable memsize")
        }
        func bytes(_ key: String, _ megabytes: UInt64) throws -> UInt64 {
            try checkedBytes(megabytes, times: 1 << 20, "\(file.name): \(key)")
        }
        let reserved = try file.number("sched.mem.min") ?? 0
        manifest.vm.memory.bytes = try bytes("memsize", megabytes)
        manifest.vm.memory.reservationBytes = try bytes("sched.mem.min", reserved)
        manifest.vm.memory.limitBytes = try bytes("sched.mem.max", limit("sched.mem.max"))
        manifest.vm.memory.shares = try shares("sched.mem.shares", normal: 10, units: megabytes)
        manifest.vm.memory.hotAdd = try file.flag("mem.hotadd") ?? false
        let pinned = try file.flag("sched.mem.pin") ?? false
        manifest.vm.memory.reservationLockedToMax = pinned || reserved >= megabytes
    }

    private func small(_ key: String, _ range: ClosedRange<UInt64>) throws -> UInt32? {
        guard let number = try file.number(key) else { return nil }
        guard range.contains(number) else {
            throw file.invalid(key, "is not between \(range.lowerBound) and \(range.upperBound)")
        }
        return UInt32(number)
    }

    private func limit(_ key: String) throws -> UInt64 {
        switch file.text(key)?.lowercased() {
        case nil, "unlimited", "-1": 0
        default: try file.number(key) ?? 0
        }
    }

    /// Named shares are half, once and twice `normal` per unit (vSphere Resource Management, "Resource Shares").
    private func shares(_ key: String, normal: UInt64, units: UInt64) throws -> UInt32 {
        guard let text = file.text(key)?.lowercased() else { return 0 }
        let perUnit: UInt64
        switch text {
        case "low": perUnit = normal / 2
        case "normal": perUnit = normal
        case "high": perUnit = normal * 2
        default:
            guard let number = UInt32(text) else {
                throw file.invalid(key, "is neither a level nor a number of shares")
            }
            return number
        }
        return UInt32(clamping: perUnit.multipliedReportingOverflow(by: units).partialValue)
    }

    private mutating func captureDevices() throws {
        var groups: [Int: PassthroughKeys] = [:]
        for entry in file.entries {
            if let (index, key) = Manifest.passthroughKey(entry.key) {
                groups[index, default: PassthroughKeys(label: "pciPassthru\(index)")].set(key, entry.value)
            } else {
                manifest.keepExtraConfiguration(entry.key, entry.value)
            }
        }
        let ordered = groups.keys.sorted()
        try manifest.assign(ordered.compactMap { groups[$0] })
        for index in ordered { try captureVirtualFunction("pciPassthru\(index)") }
        try manifest.checkDistinctMACs(file.name)
    }

    /// An SR-IOV function with a MAC address is a network card of the guest besides being a device of the host.
    private mutating func captureVirtualFunction(_ key: String) throws {
        guard try file.flag("\(key).present") ?? true,
            let address = file.text("\(key).MACAddress") ?? file.text("\(key).generatedMACAddress")
        else { return }
        var nic = NIC()
        nic.id = "nic\(manifest.nics.count)"
        nic.model = "sriov"
        nic.mac = try normalizedMAC(address, owner: "\(file.name): \(key)")
        nic.macKind = file.text("\(key).MACAddressType")?.lowercased() ?? ""
        nic.network = file.text("\(key).networkName") ?? ""
        nic.portgroupKey = file.text("\(key).dvs.portgroupId") ?? ""
        nic.connected = true
        manifest.nics.append(nic)
        manifest.warn(
            nic.id, "\(key) is an SR-IOV network function; it becomes an ordinary network card with its MAC address",
            remedy: "map its network, or assign a virtual function of the target by hand")
    }

    private func stem(of name: String) -> String? {
        let stem = name.lowercased().hasSuffix(".vmx") ? String(name.dropLast(4)) : name
        return stem.isEmpty ? nil : stem
    }
}
