package import FlotillaProtocol
import MigrationModel
import Passthrough

/// A vGPU as a domain takes it.
package enum DomainVgpu: Sendable, Equatable {
    /// A mediated device's UUID, and the function it was made on.
    case mdev(uuid: String, on: PciFunction)
    /// A virtual function whose vendor driver already made it a vGPU: libvirt must not bind another driver to it.
    case function(PciFunction)
}

extension DomainXML {
    package var hasHostDevices: Bool { !devices.isEmpty || !vgpus.isEmpty }

    /// By the guest's slots.
    private var slots: [[PciFunction]] {
        devices
            + vgpus.compactMap { vgpu in
                if case .function(let function) = vgpu { [function] } else { nil }
            }
    }

    /// Where its devices are on the host.
    private var hostFunctions: [PciFunction] {
        devices.flatMap(\.self)
            + vgpus.map { vgpu in
                switch vgpu {
                case .mdev(_, let function), .function(let function): function
                }
            }
    }

    /// Bytes of address space above 4 GiB for the devices' 64-bit registers, a power of two. Registers are aligned to their
    /// own size, and so is the window of the port that each device is behind: behind a large register and a small one the
    /// next port's begins at the next multiple of the large one. Nil where the chipset's own window (QEMU's q35: 32 GiB) is
    /// large enough.
    package var largeWindow: UInt64? {
        let sum = slots.reduce(into: UInt64(0)) { sum, functions in
            let bytes = functions.reduce(UInt64(0)) { $0 + min($1.largeBarBytes, 1 << 50) }
            guard bytes > 0 else { return }
            // Larger than the registers: other devices' small ones go between.
            var aligned: UInt64 = 1 << 20
            while aligned <= bytes { aligned <<= 1 }
            sum += aligned
        }
        guard sum > 32 << 30, sum <= 1 << 50 else { return nil }
        var window: UInt64 = 64 << 30
        while window < sum { window <<= 1 }
        return window
    }

    /// OVMF lays out its own window and ignores the host bridge's. libvirt's `<sysinfo type='fwcfg'>` refuses names below
    /// opt/ovmf as reserved, so this goes to QEMU as it is.
    func writeFirmwareWindow(_ xml: inout XMLWriter, _ window: UInt64) {
        xml.element("qemu:commandline") { xml in
            xml.element("qemu:arg", ["value": "-fw_cfg"])
            xml.element("qemu:arg", ["value": "name=opt/ovmf/X-PciMmio64Mb,string=\(window >> 20)"])
        }
    }

    /// VFIO itself locks the memory that devices reach, and libvirt allows QEMU that much (its guest's and 1 GiB). A
    /// `<hard_limit>` or `<locked/>` here would undo that: the kernel counts what `<locked/>` locks a second time, so that
    /// QEMU without privileges does not start, and the limit holds for page tables and mapped registers too.
    ///
    /// Source: libvirt's qemuDomainGetMemLockLimitBytes; the kernel's vfio_lock_acct and mlockall(2).
    func writeMemory(_ xml: inout XMLWriter) {
        guard options.hugepages else { return }
        xml.element("memoryBacking") { $0.element("hugepages") }
    }

    /// The nodes that the devices sit on, where the host has several and they hold the VM's CPUs.
    package var deviceNodes: [NumaNode] {
        let wanted = Set(hostFunctions.map(\.numaNode).filter { $0 >= 0 })
        let nodes = numaNodes.filter { wanted.contains(Int32(clamping: $0.id)) }.sorted { $0.id < $1.id }
        let cpus = nodes.reduce(0) { $0 + $1.cpus.count }
        return numaNodes.count > 1 && Int(clamping: vm.cpu.count) <= cpus ? nodes : []
    }

    /// The nodes that its memory is bound to; empty where it may come from anywhere.
    package var memoryNodes: [NumaNode] {
        let nodes = deviceNodes
        return nodes.reduce(UInt64(0)) { $0 + $1.memoryBytes } >= vm.memory.bytes ? nodes : []
    }

    /// CPUs and memory on the devices' side of the board. Memory may come from elsewhere when the node is too small for it.
    ///
    /// For huge pages libvirt has QEMU itself look at a node's CPUs, which Debian's AppArmor profile forbids: the binding is
    /// left to the CPUs' control group ("restrictive"), or to where the guest's CPUs run.
    func writeCPUs(_ xml: inout XMLWriter) {
        let count = "\(max(1, vm.cpu.count))"
        let nodes = deviceNodes
        guard !nodes.isEmpty else {
            xml.element("vcpu", ["placement": "static"], text: count)
            return
        }
        let cpus = rangesText(nodes.flatMap(\.cpus))
        xml.element("vcpu", ["placement": "static", "cpuset": cpus], text: count)
        let fits = !memoryNodes.isEmpty
        guard fits || !options.hugepages else { return }
        let bound = options.hugepages && hasRestrictive ? "restrictive" : "strict"
        xml.element("numatune") { xml in
            xml.element(
                "memory",
                [
                    // "preferred" takes one node only.
                    "mode": fits ? bound : "preferred",
                    "nodeset": fits ? rangesText(nodes.map(\.id)) : "\(nodes[0].id)",
                ])
        }
    }

    func writeVgpus(_ xml: inout XMLWriter) {
        for (index, vgpu) in vgpus.enumerated() {
            let place: KeyValuePairs = [
                "type": "pci", "domain": "0x0000", "bus": "0x\(padded(devices.count + index + 1, 2))", "slot": "0x00",
                "function": "0x0",
            ]
            switch vgpu {
            case .mdev(let uuid, _):
                xml.element(
                    "hostdev",
                    ["mode": "subsystem", "type": "mdev", "managed": "no", "model": "vfio-pci", "display": "off"]
                ) { xml in
                    xml.element("source") { $0.element("address", ["uuid": uuid]) }
                    xml.element("address", place)
                }
            case .function(let function):
                guard let address = PciAddress(function.address) else { continue }
                xml.element("hostdev", ["mode": "subsystem", "type": "pci", "managed": "no"]) { xml in
                    xml.element("source") { $0.element("address", pciAttributes(address)) }
                    if options.hideRom { xml.element("rom", ["bar": "off"]) }
                    xml.element("address", place)
                }
            }
        }
    }

    /// Device N sits on slot 0 of the root port with index N + 1. Function numbers are the host's, since drivers
    /// look for a GPU's audio at function 1; a device without function 0 on the host is numbered from 0.
    func writeHostdevs(_ xml: inout XMLWriter) throws {
        for (index, functions) in devices.enumerated() {
            let addresses = try functions.map { function in
                guard let address = PciAddress(function.address) else {
                    throw MigrationError(.invalidArgument, "\"\(function.address)\" is not a PCI address")
                }
                return address
            }
            let keep =
                addresses.contains { $0.function == 0 } && Set(addresses.map(\.function)).count == addresses.count
            guard addresses.count <= 8 else {
                throw MigrationError(.outOfRange, "\(addresses[0]): has more functions than one guest slot holds")
            }
            for (position, address) in addresses.enumerated() {
                let function = keep ? Int(address.function) : position
                xml.element("hostdev", ["mode": "subsystem", "type": "pci", "managed": "yes"]) { xml in
                    xml.element("source") { $0.element("address", pciAttributes(address)) }
                    if options.hideRom { xml.element("rom", ["bar": "off"]) }
                    let place = ("0x\(padded(index + 1, 2))", "0x\(function)")
                    let multifunction = function == 0 && addresses.count > 1
                    xml.element(
                        "address",
                        multifunction
                            ? [
                                "type": "pci", "domain": "0x0000", "bus": place.0, "slot": "0x00", "function": place.1,
                                "multifunction": "on",
                            ]
                            : ["type": "pci", "domain": "0x0000", "bus": place.0, "slot": "0x00", "function": place.1])
                }
            }
        }
    }

    private func pciAttributes(_ address: PciAddress) -> KeyValuePairs<String, String> {
        [
            "domain": "0x\(padded(address.domain, 4))", "bus": "0x\(padded(address.bus, 2))",
            "slot": "0x\(padded(address.slot, 2))", "function": "0x\(address.function)",
        ]
    }
}

/// "0-3,8", the kernel's list format.
private func rangesText(_ numbers: [UInt32]) -> String {
    var parts: [ClosedRange<UInt32>] = []
    for number in Set(numbers).sorted() {
        if let last = parts.last, number > 0, last.upperBound == number - 1 {
            parts[parts.count - 1] = last.lowerBound...number
        } else {
            parts.append(number...number)
        }
    }
    return parts.map { $0.count == 1 ? "\($0.lowerBound)" : "\($0.lowerBound)-\($0.upperBound)" }.joined(separator: ",")
}
