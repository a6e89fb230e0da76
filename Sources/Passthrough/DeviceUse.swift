import CLinux
package import FlotillaProtocol
import Glibc
import HostKit

/// Something that would lose a function if it were handed to a VM.
package struct DeviceUse: Sendable, Encodable, Hashable {
    package enum Kind: String, Sendable, Encodable {
        /// A libvirt domain's definition names it, running or not.
        case domain
        /// The ledger has it for a domain.
        case reservation
        /// Given back, not reset since.
        case dirty
        /// A process holds its VFIO group or device.
        case vfio
        /// A process has a character device of its open: DRM, NVIDIA's, sound, InfiniBand.
        case process
        /// The kernel's text console is on it.
        case console
        case virtualFunctions
        /// A mediated device or vGPU lives on it.
        case vgpu
        /// A network interface that is up, or is in another network namespace.
        case network
        /// A disk that is mounted, swapped to, or part of another.
        case disk

        /// Of the host's own doing, seen on the device itself.
        var isOfHost: Bool {
            switch self {
            case .process, .console, .vgpu, .network, .disk: true
            case .domain, .reservation, .dirty, .vfio, .virtualFunctions: false
            }
        }
    }

    package var kind: Kind
    /// "domain web", "process 4242 (Xorg)", "network interface eth0, which is up".
    package var by: String
    /// Set for domains and reservations, to tell one's own; of a vGPU, who has it if that is known.
    var owner: GPUOwner?
    /// Of a vGPU: flotilla made it, or is about to.
    var isReserved = false
    /// Only a part of the function is theirs: a virtual function of it, or a vGPU.
    var isOfPart = false

    package init(_ kind: Kind, _ by: String, owner: GPUOwner? = nil, isOfPart: Bool = false) {
        self.kind = kind
        self.by = by
        self.owner = owner
        self.isOfPart = isOfPart
    }

    private enum CodingKeys: CodingKey { case kind, by }
}

/// What sysfs itself doesn't say of who uses the host's devices.
package struct Surroundings: Sendable {
    package var holders = DeviceHolders()
    package var domains: [GPULedger.Domain] = []
    package var reservations: [GPUReservation] = []
    /// Numbers of the framebuffers that virtual consoles are on; nil when that is not known: any may have one.
    package var consoleFramebuffers: Set<Int>?
    /// Where procfs is mounted; nil for a recorded tree, which has none.
    package var proc: String?
    /// Where the running kernel's block devices are, which are opened for a moment to ask who has them; nil: asks nobody.
    package var devices: String?

    package init() {}

    /// The running host. Looks at every process.
    package init(domains: [GPULedger.Domain], ledger: GPULedger, proc: String = "/proc") throws {
        holders = DeviceHolders(proc: proc)
        reservations = try ledger.reservations()
        self.domains = domains
        self.proc = proc
        devices = "/dev"
        consoleFramebuffers = mappedFramebuffers()
    }

    /// What `markUsed` asks for: nothing of domains and reservations. Looks at every process.
    ///
    /// - Parameter sysfs: where it is not the running kernel's, nothing is known of its consoles, and no disk is asked.
    package init(proc: String, sysfs: Sysfs) {
        holders = DeviceHolders(proc: proc)
        self.proc = proc
        guard sysfs.root == Sysfs().root else { return }
        devices = "/dev"
        consoleFramebuffers = mappedFramebuffers()
    }
}

/// Marks what the host itself uses: a driver would be taken from under a console, a process, a mounted disk, a network
/// interface that is up or a vGPU. What is marked already keeps its words: call it last. A GPU marked for these still has
/// room for another vGPU.
///
/// - Parameter vfio: also what a process has open through VFIO.
package func markUsed(
    _ functions: inout [PciFunction], sysfs: Sysfs, around: Surroundings, vfio: Bool = false
) {
    let users = DeviceUsers(sysfs, around)
    // A bridge is on the path of everything behind it, and is never handed over.
    for index in functions.indices where functions[index].inUseBy.isEmpty && !functions[index].bridge {
        guard let address = PciAddress(functions[index].address) else { continue }
        let uses = users.uses(
            of: address, group: functions[index].iommuGroup, driver: functions[index].driver, virtualFunctions: 0)
        let use = uses.first { $0.kind.isOfHost || vfio && $0.kind == .vfio }
        if let use { functions[index].inUseBy = use.by }
    }
}

/// Asks the kernel which framebuffer each virtual console is on (MAX_NR_CONSOLES of them); nil when it doesn't say.
func mappedFramebuffers(devices: String = "/dev") -> Set<Int>? {
    guard let name = try? Files.list(devices).first(where: { $0.hasPrefix("fb") && Int($0.dropFirst(2)) != nil }),
        let file = try? File("\(devices)/\(name)", O_RDONLY)
    else { return nil }
    let mapped = (1...63).map { Int(flotilla_console_framebuffer(file.descriptor, $0)) }
    return mapped.contains(-2) ? nil : Set(mapped.filter { $0 >= 0 })
}

/// Finds users by function. Reads each of the kernel's lists once.
struct DeviceUsers {
    private let sysfs: Sysfs
    private let around: Surroundings
    private let groups: [Int32: String]
    /// Interfaces that are up and disks in use, by the address of every function on their path.
    private var classes: [String: [DeviceUse]] = [:]
    private let consoleOnFramebuffer: Bool
    /// Of habanalabs before Linux 6.4, whose class lies beside the PCI devices.
    private let habanaFiles: [String: [String]]
    private let computeNodes: KFDNodes

    init(_ sysfs: Sysfs, _ around: Surroundings) {
        self.sysfs = sysfs
        self.around = around
        groups = around.holders.groups
        let consoles = sysfs.list("class/vtconsole").map { "class/vtconsole/\($0)" }
        // A tree without that class says nothing: then a framebuffer counts as a console.
        consoleOnFramebuffer =
            consoles.isEmpty
            || consoles.contains {
                sysfs.text("\($0)/name")?.contains("frame buffer") == true && sysfs.number("\($0)/bind") == 1
            }
        habanaFiles = Dictionary(
            grouping: sysfs.list("class/habanalabs"), by: { sysfs.text("class/habanalabs/\($0)/pci_addr") ?? "" }
        ).mapValues { names in names.map { "/dev/\($0)" } }
        computeNodes = KFDNodes(sysfs, proc: around.proc)
        for name in sysfs.list("class/net") {
            // Drivers that don't tell of their link leave it "unknown", 802.1X "dormant"; an interface that is down has none.
            let state = sysfs.text("class/net/\(name)/operstate")
            guard state == "up" || sysfs.number("class/net/\(name)/carrier") == 1 else { continue }
            note("class/net/\(name)", DeviceUse(.network, "network interface \(name), which is up"))
        }
        for name in (sysfs.text("class/tty/console/active") ?? "").split(separator: " ") {
            note("class/tty/\(name)", DeviceUse(.console, "the kernel's console on \(name)"))
        }
        for (number, holder) in around.holders.byNumber.sorted(by: { $0.key < $1.key }) {
            note("dev/char/\(number)", DeviceUse(.process, holder))
        }
        noteFiles()
        noteDisks()
    }

    /// Of classes whose files lead to the device itself: past the disks of a storage controller, past a network's interfaces.
    private mutating func noteFiles() {
        for (name, files) in [
            ("scsi_generic", "/dev"), ("bsg", "/dev/bsg"), ("nvme", "/dev"), ("nvme-generic", "/dev"),
            ("infiniband_verbs", "/dev/infiniband"), ("infiniband_mad", "/dev/infiniband"), ("uio", "/dev"),
        ] {
            for device in sysfs.list("class/\(name)") {
                guard let holder = around.holders.byPath["\(files)/\(device)"] else { continue }
                note("class/\(name)/\(device)", DeviceUse(.process, "\(holder), which has \(device)"))
            }
        }
    }

    private mutating func noteDisks() {
        guard let disks = DiskUse(sysfs, around) else { return }
        let names = sysfs.list("class/block")
        for name in names {
            if let use = disks.use(of: name) { note("class/block/\(name)", DeviceUse(.disk, use)) }
        }
        // Only what nothing is known of is asked for: that claims it for a moment.
        for name in names {
            let free = functions(behind: "class/block/\(name)").filter { address in
                !(classes[address]?.contains { $0.kind == .disk } ?? false)
            }
            guard !free.isEmpty, let use = disks.claim(on: name) else { continue }
            for address in free { classes[address, default: []].append(DeviceUse(.disk, use)) }
        }
    }

    private mutating func note(_ link: String, _ use: DeviceUse) {
        for address in functions(behind: link) where !(classes[address]?.contains(use) ?? false) {
            classes[address, default: []].append(use)
        }
    }

    /// Every function on the path of a class's device. A disk of native NVMe multipath lies below its subsystem, which is
    /// on no bus: behind it are the functions of all its controllers. So is one over Fibre Channel.
    private func functions(behind link: String) -> Set<String> {
        guard let target = sysfs.linkPath(link) else { return [] }
        let parts = target.split(separator: "/").map(String.init)
        let own = Set(parts.compactMap { PciAddress($0)?.description }).union(adapters(of: parts))
        guard let index = parts.firstIndex(of: "nvme-subsystem"), index + 1 < parts.count else { return own }
        let subsystem = "devices/virtual/nvme-subsystem/\(parts[index + 1])"
        return sysfs.list(subsystem).filter { $0.hasPrefix("nvme") }
            .compactMap { sysfs.linkPath("\(subsystem)/\($0)") }
            .reduce(into: own) { all, controller in
                let parts = controller.split(separator: "/").map(String.init)
                all.formUnion(parts.compactMap { PciAddress($0)?.description } + adapters(of: parts))
            }
    }

    /// The host adapter of an NVMe controller over Fibre Channel, whose address names that one's port only:
    /// "traddr=nn-0x…:pn-0x…,host_traddr=nn-0x…:pn-0x…".
    private func adapters(of path: [String]) -> [String] {
        guard let index = path.firstIndex(of: "nvme-fabrics"), index + 2 < path.count,
            let address = sysfs.text("devices/virtual/nvme-fabrics/\(path[index + 1])/\(path[index + 2])/address"),
            let host = address.split(separator: ",").first(where: { $0.hasPrefix("host_traddr=nn-") }),
            let port = host.split(separator: ":").first(where: { $0.hasPrefix("pn-") })?.dropFirst(3)
        else { return [] }
        return sysfs.list("class/fc_host").filter { sysfs.text("class/fc_host/\($0)/port_name") == String(port) }
            .flatMap { sysfs.linkPath("class/fc_host/\($0)")?.split(separator: "/").map(String.init) ?? [] }
            .compactMap { PciAddress($0)?.description }
    }

    func uses(of address: PciAddress, group: Int32, driver: String, virtualFunctions: Int) -> [DeviceUse] {
        let folder = "bus/pci/devices/\(address)"
        let own = GPUResource(function: address, sysfs: sysfs)
        var uses: [DeviceUse] = []
        for domain in around.domains {
            let theirs = domain.resources.filter { $0.overlaps(own) }
            guard !theirs.isEmpty else { continue }
            uses.append(
                DeviceUse(
                    .domain, "domain \(domain.name)",
                    owner: GPUOwner(domain: domain.name, migration: domain.migration, fence: 0),
                    isOfPart: theirs.allSatisfy { $0.isPart(of: own) }))
        }
        for entry in around.reservations where entry.resource.overlaps(own) {
            switch entry.state {
            case .reserved:
                uses.append(
                    DeviceUse(
                        .reservation, "\(entry.owner)", owner: entry.owner, isOfPart: entry.resource.isPart(of: own)))
            case .dirty: uses.append(DeviceUse(.dirty, "what \(entry.owner) left in it", owner: entry.owner))
            }
        }
        if isVfio(driver: driver) {
            if let holder = groups[group] { uses.append(DeviceUse(.vfio, holder)) }
            for device in sysfs.list("\(folder)/vfio-dev") {
                if let holder = around.holders.byPath["/dev/vfio/devices/\(device)"] {
                    uses.append(DeviceUse(.vfio, holder))
                }
            }
        }
        let names = sysfs.list(folder)
        // What sysfs has of a network interface shows in its own network namespace only.
        for parent in [folder] + names.filter({ $0.hasPrefix("virtio") }).map({ "\(folder)/\($0)" })
        where sysfs.exists("\(parent)/net") && sysfs.list("\(parent)/net").isEmpty {
            uses.append(DeviceUse(.network, "a network interface in another network namespace"))
        }
        // The firmware's framebuffer (efifb, simpledrm) is a device below it.
        let displays = [folder] + names.filter { $0.contains("-framebuffer.") }.map { "\(folder)/\($0)" }
        let framebuffers = displays.flatMap { sysfs.list("\($0)/graphics") }.filter { $0.hasPrefix("fb") }
        let consoles = framebuffers.filter { name in
            around.consoleFramebuffers.map { $0.contains(Int(name.dropFirst(2)) ?? -1) } ?? true
        }
        if !consoles.isEmpty && consoleOnFramebuffer {
            uses.append(DeviceUse(.console, "the kernel's console on \(consoles.joined(separator: ", "))"))
        }
        var paths = framebuffers.map { "/dev/\($0)" }
        paths += displays.flatMap { sysfs.list("\($0)/drm") }.map { "/dev/dri/\($0)" }
        paths += sysfs.list("\(folder)/accel").map { "/dev/accel/\($0)" }
        paths += habanaFiles[address.description] ?? []
        if let minor = nvidiaMinor(address) { paths.append("/dev/nvidia\(minor)") }
        var processes: Set<String> = []
        if driver == "amdgpu" {
            paths += computeNodes.files[address.slotName] ?? []
            processes.formUnion(computeNodes.users(of: address.slotName))
        }
        processes.formUnion(paths.compactMap { around.holders.byPath[$0] })
        uses += processes.sorted().map { DeviceUse(.process, $0) }
        if virtualFunctions > 0 {
            uses.append(
                DeviceUse(
                    .virtualFunctions, "its \(virtualFunctions) virtual function\(virtualFunctions == 1 ? "" : "s")"))
        }
        for name in names where isUUID(name) {
            uses.append(vgpu("mediated device \(name)", GPUResource(mdev: name, partOf: [])))
        }
        if let type = sysfs.text("\(folder)/nvidia/current_vgpu_type"), !type.isEmpty, type != "0" {
            uses.append(vgpu("a vGPU of type \(type)", own))
        }
        return uses + (classes[address.description] ?? [])
    }

    private func vgpu(_ text: String, _ resource: GPUResource) -> DeviceUse {
        let entry = around.reservations.first { $0.state == .reserved && $0.resource.key == resource.key }
        let domain = around.domains.first { $0.resources.contains { $0.key == resource.key } }
        var use = DeviceUse(.vgpu, text, owner: entry?.owner)
        if let domain { use.owner = GPUOwner(domain: domain.name, migration: domain.migration, fence: 0) }
        use.isReserved = entry != nil
        return use
    }

    /// NVIDIA's driver numbers its device files in its own order.
    private func nvidiaMinor(_ address: PciAddress) -> String? {
        guard let proc = around.proc,
            let bytes = try? Files.read("\(proc)/driver/nvidia/gpus/\(address)/information", limit: 65_536)
        else { return nil }
        let line = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first { $0.hasPrefix("Device Minor:") }
        return line.map { $0.dropFirst(13).trimmingPrefix(while: \.isWhitespace) }.map(String.init)
    }
}

func isUUID(_ text: String) -> Bool {
    let utf8 = Array(text.utf8)
    return utf8.count == 36
        && utf8.enumerated().allSatisfy { index, byte in
            [8, 13, 18, 23].contains(index)
                ? byte == UInt8(ascii: "-")
                : (0x30...0x39).contains(byte) || (0x61...0x66).contains(byte) || (0x41...0x46).contains(byte)
        }
}

/// vfio-pci or a vendor's variant of it (mlx5_vfio_pci, nvgrace_gpu_vfio_pci).
package func isVfio(driver: String) -> Bool { driver.contains("vfio") }

/// The only VFIO driver that gives a VM all of the device, where that is not vfio-pci: of NVIDIA's GPUs whose memory is
/// coherent with the CPU's (kernel: drivers/vfio/pci/nvgrace-gpu; GH200, GB200, GB300).
func variantDriver(of function: PciFunction) -> String? {
    let isCoherent = [0x2342, 0x2345, 0x2348, 0x2941, 0x31c2].contains(function.id.device)
    return function.id.vendor == 0x10de && isCoherent ? "nvgrace_gpu_vfio_pci" : nil
}
