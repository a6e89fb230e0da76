import FlotillaProtocol
import HostKit
import MigrationModel

/// Turns one virtual system of an OVF package into a manifest.
struct OVFCapture {
    let package: OVFPackage
    let envelope: OVFEnvelope
    let digests: DigestList?
    let system: XMLElement
    let hardware: XMLElement
    let items: [OVFItem]
    var manifest = Manifest()
    /// InstanceID to the key `boot_order` uses: "disk:scsi0:0", "net:ethernet0", "cdrom".
    var bootKeys: [String: String] = [:]

    init(_ package: OVFPackage, vmName: String?) throws {
        self.package = package
        // Before the envelope is understood: a damaged one should be called damaged, not malformed.
        var digests: DigestList?
        if let name = try package.companion(".mf") {
            let shown = "\(Files.parent(of: package.path))/\(name)"
            let region = try package.region(name, owner: package.path)
            let list = try DigestList(
                region.read(limit: DigestList.sizeLimit, name: shown),
                name: package.folder == nil ? "\(package.path): \(name)" : shown)
            for entry in list.entries where !package.contains(entry.file) {
                throw MigrationError(
                    .notFound, "\(list.name): line \(entry.line): file \(entry.file.printable) does not exist",
                    hint: "copy the missing file, or export the VM again")
            }
            try list.verify(package.descriptor, file: package.descriptorName)
            digests = list
        }
        self.digests = digests
        envelope = try OVFEnvelope(package)
        system = try envelope.system(named: vmName)
        let sections = system.ovfAll("VirtualHardwareSection")
        let preferred = sections.first { section in
            let types = section.ovf("System")?.child("VirtualSystemType", OVFNames.system)?.text ?? ""
            return types.split(separator: " ").contains { $0.trimmingPrefix(" ").hasPrefix("vmx-") }
        }
        guard let hardware = preferred ?? sections.first else {
            throw MigrationError(
                .invalidArgument,
                "\(envelope.name): \(OVFEnvelope.systemName(system).printable) has no "
                    + "VirtualHardwareSection")
        }
        self.hardware = hardware
        items = try Self.items(of: hardware, envelope)
    }

    /// The devices of the chosen deployment option. One that repeats an earlier InstanceID replaces it; ranges
    /// (`ovf:bound`) only bound others.
    private static func items(of hardware: XMLElement, _ envelope: OVFEnvelope) throws -> [OVFItem] {
        var items: [OVFItem] = []
        var places: [String: Int] = [:]
        let names: Set<String> = ["Item", "StorageItem", "EthernetPortItem"]
        for element in hardware.children where names.contains(element.name) {
            guard OVFNames.envelope.contains(element.namespace) else { continue }
            if let bound = element.ovfAttribute("bound"), !bound.isEmpty, bound != "normal" { continue }
            if let options = element.ovfAttribute("configuration")?.split(separator: " "), !options.isEmpty {
                guard let chosen = envelope.configuration, options.contains(Substring(chosen)) else { continue }
            }
            let item = try OVFItem(element, owner: envelope.name)
            if let place = places[item.id] {
                items[place] = item
            } else {
                guard items.count < 4096 else {
                    throw MigrationError(.invalidArgument, "\(envelope.name): more than 4096 devices")
                }
                places[item.id] = items.count
                items.append(item)
            }
        }
        return items
    }

    mutating func run(_ stop: StopFlag) throws -> Manifest {
        if let remark = package.remark { manifest.note("source", remark) }
        if try package.companion(".cert") != nil {
            manifest.note("source", "the package is signed (.cert); its signature is not checked, its digests are")
        }
        if digests == nil {
            manifest.note("source", "the package has no .mf file: nothing tells whether its files are complete")
        }
        try captureMachine()
        captureSettings()
        try captureProcessors()
        try captureMemory()
        try stop.check()
        try captureDisks(stop)
        try captureNetwork()
        try capturePorts()
        try captureDevices()
        captureBootOrder()
        captureSections()
        return manifest
    }

    private mutating func captureMachine() throws {
        let name = OVFEnvelope.systemName(system)
        guard !name.isEmpty else {
            throw MigrationError(.invalidArgument, "\(envelope.name): the virtual system has neither name nor id")
        }
        manifest.vm.name = name
        // A package is made of a VM that is off, or of its snapshot.
        manifest.vm.powerState = .poweredOff
        manifest.vm.firmware = .bios
        let types = hardware.ovf("System")?.child("VirtualSystemType", OVFNames.system)?.text ?? ""
        let versions = types.split { $0 == " " || $0 == "," || $0.isNewline }.map(String.init)
        manifest.vm.hardwareVersion = versions.last { $0.hasPrefix("vmx-") } ?? versions.first ?? ""
        if let guest = system.ovf("OperatingSystemSection") {
            manifest.vm.guestID = guest.attribute("osType", OVFNames.vmware) ?? ""
            manifest.vm.guestFullName = guest.ovf("Description")?.text.trimmed ?? ""
            if manifest.vm.guestID.isEmpty {
                let number = guest.ovfAttribute("id") ?? ""
                manifest.vm.guestID = OVFGuest.identifier(cim: number, description: manifest.vm.guestFullName)
            }
        }
        manifest.vm.annotation = system.ovf("AnnotationSection")?.ovf("Annotation")?.text ?? ""
    }

    /// `vmw:Config`: properties of vSphere's VirtualMachineConfigSpec. `vmw:ExtraConfig`: lines of the VMX.
    private mutating func captureSettings() {
        for (key, value) in hardware.vmwareSettings("Config") {
            let flag = value.asFlag ?? false
            switch key.lowercased() {
            case "firmware": manifest.vm.firmware = value.lowercased() == "efi" ? .efi : .bios
            case "uefi.secureboot.enabled", "bootoptions.efisecurebootenabled": manifest.vm.secureBoot = flag
            case "cpuhotaddenabled": manifest.vm.cpu.hotAdd = flag
            case "cpuhotremoveenabled": manifest.vm.cpu.hotRemove = flag
            case "memoryhotaddenabled": manifest.vm.memory.hotAdd = flag
            case "memoryreservationlockedtomax": manifest.vm.memory.reservationLockedToMax = flag
            case "changetrackingenabled": manifest.vm.changeTracking = flag
            case "nestedhvenabled", "vpmcenabled", "flags.vvtdenabled", "flags.vbsenabled":
                if flag { manifest.extraConfig[key] = value }
            case "tools.synctimewithhost", "tools.synctimewithhostallowed": manifest.extraConfig[key] = value
            default: break
            }
        }
        for (key, value) in hardware.vmwareSettings("ExtraConfig") {
            switch key.lowercased() {
            case "uuid.bios": manifest.vm.biosUuid = value.canonicalUUID ?? ""
            case "vc.uuid": manifest.vm.instanceUuid = value.canonicalUUID ?? ""
            case "sched.mem.pin": manifest.vm.memory.reservationLockedToMax = value.asFlag ?? false
            default: break
            }
            if Manifest.passthroughKey(key) == nil { manifest.keepExtraConfiguration(key, value) }
        }
    }

    private mutating func captureProcessors() throws {
        guard let item = items.last(where: { $0.kind == .processor }), let count = try item.number("VirtualQuantity"),
            (1...4096).contains(count)
        else {
            throw MigrationError(.invalidArgument, "\(envelope.name): states no usable number of CPUs")
        }
        var cores: UInt32 = 1
        if let text = item.element.child("CoresPerSocket", OVFNames.vmware)?.text.trimmed, !text.isEmpty {
            guard let number = UInt32(text), number > 0 else {
                throw MigrationError(
                    .invalidArgument, "\(envelope.name): CoresPerSocket '\(text.printable)' is not a number of cores")
            }
            cores = number
            if UInt32(count) % number != 0 {
                cores = 1
                manifest.warn(
                    "vm", "\(count) CPUs are no multiple of \(number) cores per socket; carried with one per socket",
                    remedy: "correct CoresPerSocket on the source if the guest counts sockets")
            }
        }
        manifest.vm.cpu.count = UInt32(count)
        manifest.vm.cpu.coresPerSocket = cores
        let unit = try AllocationUnits.hertz(item["AllocationUnits"] ?? "hertz * 10^6", owner: envelope.name)
        func megahertz(_ key: String) throws -> UInt64 {
            // A limit of -1 is none.
            guard item[key] != "-1" else { return 0 }
            let (product, overflow) = (try item.number(key) ?? 0).multipliedReportingOverflow(by: unit)
            guard !overflow else {
                throw MigrationError(.invalidArgument, "\(envelope.name): the CPUs' \(key) exceeds 2^64 Hz")
            }
            return product / 1_000_000
        }
        manifest.vm.cpu.reservationMhz = try megahertz("Reservation")
        manifest.vm.cpu.limitMhz = try megahertz("Limit")
        manifest.vm.cpu.shares = UInt32(clamping: try item.number("Weight") ?? 0)
    }

    private mutating func captureMemory() throws {
        guard let item = items.last(where: { $0.kind == .memory }), let count = try item.number("VirtualQuantity"),
            count > 0
        else {
            throw MigrationError(.invalidArgument, "\(envelope.name): states no usable amount of memory")
        }
        let unit = try AllocationUnits.bytes(
            item["AllocationUnits"] ?? item["VirtualQuantityUnits"] ?? "byte", owner: "\(envelope.name): memory")
        func bytes(_ count: UInt64, _ what: String) throws -> UInt64 {
            try checkedBytes(count, times: unit, "\(envelope.name): \(what)")
        }
        manifest.vm.memory.bytes = try bytes(count, "memory")
        manifest.vm.memory.reservationBytes = try bytes(item.number("Reservation") ?? 0, "memory reservation")
        manifest.vm.memory.limitBytes =
            item["Limit"] == "-1" ? 0 : try bytes(item.number("Limit") ?? 0, "memory limit")
        manifest.vm.memory.shares = UInt32(clamping: try item.number("Weight") ?? 0)
        if manifest.vm.memory.reservationBytes >= manifest.vm.memory.bytes {
            manifest.vm.memory.reservationLockedToMax = true
        }
    }

    /// One `vmw:BootOrderSection` per device, first first; without any the first disk boots.
    private mutating func captureBootOrder() {
        for section in system.children("BootOrderSection", OVFNames.vmware).prefix(64) {
            guard let id = section.attribute("instanceId", OVFNames.vmware), let key = bootKeys[id] else { continue }
            manifest.vm.bootOrder.append(key)
        }
        let first = manifest.vm.bootOrder.first { $0.hasPrefix("disk:") }
        let index = manifest.disks.firstIndex { bootKey($0) == first } ?? 0
        if manifest.disks.indices.contains(index) { manifest.disks[index].boot = true }
    }

    func bootKey(_ disk: Disk) -> String {
        let bus =
            switch disk.controller {
            case .ide: "ide"
            case .sata: "sata"
            case .nvme: "nvme"
            default: "scsi"
            }
        return "disk:\(bus)\(disk.busNumber):\(disk.unitNumber)"
    }

    private mutating func captureSections() {
        let properties = system.ovfAll("ProductSection").flatMap { $0.ovfAll("Property") }
        if !properties.isEmpty {
            manifest.note(
                "vm",
                "its \(properties.count) OVF properties (ovfenv) are not carried: the target has no such transport")
        }
        for element in system.children where !OVFNames.envelope.contains(element.namespace) {
            // Sections are required unless they say otherwise (DSP0243, 7.1).
            guard element.name.hasSuffix("Section"), element.name != "BootOrderSection",
                element.ovfAttribute("required")?.asFlag != false
            else { continue }
            manifest.warn(
                "vm", "its section \(element.name.printable) is not understood and not carried",
                remedy: "look in line \(element.line) of the OVF for what it asks for")
        }
    }
}
