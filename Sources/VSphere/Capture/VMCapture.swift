import Export
import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf

/// Turns the properties of one VM into its manifest.
struct VMCapture {
    static let paths = [
        "name", "parent", "runtime.host", "runtime.powerState", "runtime.connectionState", "config.template",
        "config.uuid", "config.instanceUuid", "config.guestId", "config.guestFullName", "config.version",
        "config.firmware", "config.bootOptions", "config.hardware", "config.cpuAllocation", "config.memoryAllocation",
        "config.cpuHotAddEnabled", "config.cpuHotRemoveEnabled", "config.memoryHotAddEnabled",
        "config.memoryReservationLockedToMax", "config.changeTrackingEnabled", "config.extraConfig",
        "config.annotation", "config.keyId", "config.deviceGroups", "config.ftInfo", "snapshot", "guest.net",
        "guest.ipStack", "guest.toolsStatus", "guest.toolsVersion", "guest.hostName", "guest.guestFamily",
        "guest.guestFullName",
    ]

    let content: ObjectContent
    let inventory: Inventory
    let source: VSphereURL
    var manifest = Manifest()
    /// Devices by key.
    var devices: [Int64: VIMNode] = [:]
    /// Of disks and network cards: "scsi0:1", "ethernet0".
    var labels: [Int64: String] = [:]

    private let tags: VMTags

    init(_ content: ObjectContent, _ inventory: Inventory, _ source: VSphereURL, _ tags: VMTags) {
        self.content = content
        self.inventory = inventory
        self.source = source
        self.tags = tags
    }

    /// - Throws: `invalidArgument` for what no server should say.
    mutating func run() throws -> Manifest {
        captureSource()
        captureMachine()
        guard content["config.hardware"] != nil else {
            let state = content.text("runtime.connectionState") ?? "unknown"
            manifest.block(
                "vm", "the server has no configuration of it (connection state: \(state.printable))",
                remedy: "reconnect its host, register it again, or let the account see it")
            return finished()
        }
        if !content.hidden.isEmpty {
            let hidden = content.hidden.sorted().map(\.printable).joined(separator: ", ")
            manifest.warn(
                "vm", "the server does not show the account \(hidden) of it; what that holds is not carried",
                remedy: "give the account a role that may read it, and capture it again")
        }
        for device in content["config.hardware"]?.all("device") ?? [] {
            if let key = device.number("key") { devices[key] = device }
        }
        captureProcessors()
        captureMemory()
        captureDisks()
        captureNetwork()
        capturePorts()
        captureBootOrder()
        captureState()
        try captureAssignedDevices()
        return finished()
    }

    private func finished() -> Manifest {
        var manifest = manifest
        manifest.source.fingerprint = fingerprint
        return manifest
    }

    /// In the order of their keys.
    var orderedDevices: [VIMNode] { devices.sorted { $0.key < $1.key }.map(\.value) }

    private mutating func captureSource() {
        let host = inventory.host(content.reference("runtime.host")?.value)
        var url = source
        url.vm = nil
        manifest.schemaVersion = 1
        manifest.capturedAt = Moment.now.protobuf
        manifest.source.kind = .vsphere
        manifest.source.url = url.description
        manifest.source.vcenterInstanceUuid = inventory.infrastructure.about.instanceUUID
        manifest.source.datacenter = inventory.datacenter(
            of: content.reference("parent") ?? content.reference("runtime.host"))
        manifest.source.vmMoid = content.object.value
        manifest.source.hostMoid = content.reference("runtime.host")?.value ?? ""
        manifest.source.hostName = host?.name ?? ""
        manifest.source.hostUuid = host?.uuid ?? ""
    }

    private mutating func captureMachine() {
        manifest.vm.name = unescapedName(content.text("name") ?? "")
        manifest.vm.instanceUuid = content.text("config.instanceUuid")?.canonicalUUID ?? ""
        manifest.vm.biosUuid = content.text("config.uuid")?.canonicalUUID ?? ""
        manifest.vm.guestID = content.text("config.guestId") ?? ""
        manifest.vm.guestFullName = content.text("config.guestFullName") ?? ""
        manifest.vm.hardwareVersion = content.text("config.version") ?? ""
        switch content.text("config.firmware") {
        case "efi": manifest.vm.firmware = .efi
        case "bios", nil: manifest.vm.firmware = .bios
        case .some(let other):
            manifest.block(
                "vm", "its firmware '\(other.printable)' is neither bios nor efi", remedy: "update this program")
        }
        manifest.vm.secureBoot = content["config.bootOptions"]?.flag("efiSecureBootEnabled") ?? false
        manifest.vm.changeTracking = content.flag("config.changeTrackingEnabled") ?? false
        manifest.vm.annotation = content.text("config.annotation") ?? ""
        manifest.vm.folder = inventory.folder(of: content.reference("parent"))
        switch tags {
        case .known(let tags): manifest.vm.tags = tags[content.object.value] ?? []
        case .unknown(let error):
            manifest.note("vm", "its tags are not known: \(error.message)", remedy: error.hint ?? "")
        }
        manifest.vm.encrypted = content["config.keyId"] != nil
        if manifest.vm.encrypted {
            manifest.block(
                "vm", "the VM is encrypted; its disks can't be read without the source's key provider",
                remedy: "decrypt it on the source (VM policies, VM storage policy without encryption)")
        }
        if content.flag("config.template") == true { manifest.note("vm", "it is a template") }
        if content["config.ftInfo"] != nil {
            manifest.block(
                "vm", "it is fault tolerant: a second VM runs in step with it",
                remedy: "turn Fault Tolerance off on the source")
        }
        manifest.vm.tools.status = content.text("guest.toolsStatus") ?? ""
        manifest.vm.tools.version = content.text("guest.toolsVersion") ?? ""
        manifest.vm.tools.hostName = content.text("guest.hostName") ?? ""
        manifest.vm.tools.family = content.text("guest.guestFamily") ?? ""
        manifest.vm.tools.guestFullName = content.text("guest.guestFullName") ?? ""
    }

    private mutating func captureProcessors() {
        let hardware = content["config.hardware"]
        let count = UInt32(clamping: max(1, hardware?.number("numCPU") ?? 1))
        // 0 where the server chooses by itself.
        var cores = UInt32(clamping: max(1, hardware?.number("numCoresPerSocket") ?? 1))
        if count % cores != 0 {
            manifest.warn(
                "vm", "\(count) CPUs are no multiple of \(cores) cores per socket; carried with one core per socket",
                remedy: "correct the cores per socket on the source if the guest counts sockets")
            cores = 1
        }
        manifest.vm.cpu.count = count
        manifest.vm.cpu.coresPerSocket = cores
        manifest.vm.cpu.hotAdd = content.flag("config.cpuHotAddEnabled") ?? false
        manifest.vm.cpu.hotRemove = content.flag("config.cpuHotRemoveEnabled") ?? false
        guard let allocation = content["config.cpuAllocation"] else { return }
        manifest.vm.cpu.reservationMhz = UInt64(clamping: allocation.number("reservation") ?? 0)
        // -1: no limit.
        manifest.vm.cpu.limitMhz = UInt64(clamping: allocation.number("limit") ?? 0)
        manifest.vm.cpu.shares = UInt32(clamping: allocation["shares"]?.number("shares") ?? 0)
    }

    private mutating func captureMemory() {
        func bytes(_ megabytes: Int64?) -> UInt64 {
            let (bytes, overflow) = UInt64(clamping: megabytes ?? 0).multipliedReportingOverflow(by: 1 << 20)
            return overflow ? 0 : bytes
        }
        let hardware = content["config.hardware"]
        manifest.vm.memory.bytes = bytes(hardware?.number("memoryMB"))
        if manifest.vm.memory.bytes == 0 {
            manifest.block("vm", "the server states no usable memory size", remedy: "set it on the source")
        }
        manifest.vm.memory.hotAdd = content.flag("config.memoryHotAddEnabled") ?? false
        manifest.vm.memory.reservationLockedToMax = content.flag("config.memoryReservationLockedToMax") ?? false
        guard let allocation = content["config.memoryAllocation"] else { return }
        manifest.vm.memory.reservationBytes = bytes(allocation.number("reservation"))
        manifest.vm.memory.limitBytes = bytes(allocation.number("limit"))
        manifest.vm.memory.shares = UInt32(clamping: allocation["shares"]?.number("shares") ?? 0)
    }

    /// Changes when the disks' contents or places may have: SHA-256 over the VM's and each disk's identity and, where the
    /// server tells it, the id of the disk's content. Under a snapshot its first half is of the identities alone: what runs
    /// writes to new files all the time. The second is of the contents while the VM is off; the configuration's own
    /// version is in neither, since each snapshot that we make or remove changes it.
    private var fingerprint: String {
        let identity = Digest()
        let content = Digest()
        func add(_ text: String, to digests: Digest...) {
            for digest in digests { digest.update(Array("\(text.utf8.count):\(text)\n".utf8)) }
        }
        for text in [manifest.source.vcenterInstanceUuid, manifest.source.vmMoid, manifest.vm.instanceUuid] {
            add(text, to: identity, content)
        }
        for disk in manifest.disks {
            for text in [disk.label, "\(disk.capacityBytes)", disk.uuid] { add(text, to: identity, content) }
            let key = labels.first { $0.value == disk.label }?.key
            let contentID = key.flatMap { devices[$0]?["backing"]?.text("contentId") } ?? ""
            for text in [disk.source.path, contentID] { add(text, to: content) }
        }
        guard source.snapshot else { return hex(content.finalize()) }
        let whole = hex(identity.finalize())
        guard manifest.vm.powerState == .poweredOff else { return whole }
        let half = whole.count / 2
        return String(whole.prefix(half)) + hex(content.finalize()).suffix(half)
    }
}
