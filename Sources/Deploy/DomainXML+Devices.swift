import FlotillaProtocol
import MigrationModel
import Passthrough

extension DomainXML {
    func writeDisks(_ xml: inout XMLWriter, _ boot: BootOrder) throws {
        let bus = options.diskBus(for: vm)
        let (busName, prefix) =
            switch bus {
            case .virtio: ("virtio", "vd")
            case .scsi: ("scsi", "sd")
            case .sata: ("sata", "sd")
            case .ide: ("ide", "hd")
            }
        guard bus != .ide || manifest.disks.count <= 4 else {
            throw MigrationError(
                .failedPrecondition,
                "VM \(vm.name): has \(manifest.disks.count) disks; a guest of its age (\(vm.guestID)) gets IDE, which holds 4",
                hint: "choose another bus whose driver it has, with --disk-bus")
        }
        for (index, disk) in manifest.disks.enumerated() {
            guard disk.target.path.hasPrefix("/"), ["qcow2", "raw"].contains(disk.target.format) else {
                throw MigrationError(
                    .failedPrecondition, "\(disk.id): has no converted image", hint: "convert the VM's disks first")
            }
            let buffered = bufferedDisks.contains(disk.id)
            xml.element("disk", ["type": "file", "device": "disk"]) { xml in
                // QEMU accepts native AIO only with O_DIRECT, that is cache "none".
                xml.element(
                    "driver",
                    [
                        "name": "qemu", "type": disk.target.format, "cache": buffered ? "writeback" : "none",
                        "io": buffered ? "threads" : "native", "discard": "unmap",
                    ])
                xml.element("source", ["file": disk.target.path])
                xml.element("target", ["dev": prefix + diskLetters(index), "bus": busName])
                if let serial = diskSerial(disk, bus) { xml.element("serial", text: serial) }
                if let order = boot.disks[disk.id] { xml.element("boot", ["order": "\(order)"]) }
                if bus == .scsi {
                    // Explicit, or libvirt starts a second controller of another model after the seventh disk.
                    xml.element(
                        "address",
                        ["type": "drive", "controller": "0", "bus": "0", "target": "0", "unit": "\(index)"])
                }
            }
        }
    }

    /// The disk UUID without its separators, as VMware shows it to the guest. SCSI carries it whole; virtio-blk, SATA
    /// and IDE hold 20 characters, the last ones here since the first are VMware's vendor code.
    private func diskSerial(_ disk: Disk, _ bus: GuestDiskBus) -> String? {
        let serial = disk.uuid.lowercased().filter { $0.isASCII && ($0.isLetter || $0.isNumber) }
        guard !serial.isEmpty else { return nil }
        return String(serial.suffix(bus == .scsi ? 36 : 20))
    }

    func writeControllers(_ xml: inout XMLWriter) throws {
        if options.diskBus(for: vm) == .scsi {
            xml.element("controller", ["type": "scsi", "index": "0", "model": "virtio-scsi"])
        }
        xml.element("controller", ["type": "usb", "index": "0", "model": isI440FX ? "piix3-uhci" : "qemu-xhci"])
        guard hasHostDevices else { return }
        if let largeWindow {
            xml.element("controller", ["type": "pci", "index": "0", "model": "pcie-root"]) {
                $0.element("pcihole64", ["unit": "KiB"], text: "\(largeWindow >> 10)")
            }
        } else {
            xml.element("controller", ["type": "pci", "index": "0", "model": "pcie-root"])
        }
        for index in 0..<(devices.count + vgpus.count) {
            xml.element("controller", ["type": "pci", "index": "\(index + 1)", "model": "pcie-root-port"])
        }
    }

    func writeNICs(_ xml: inout XMLWriter, _ boot: BootOrder) throws {
        for nic in manifest.nics {
            let type: String
            let source: KeyValuePairs<String, String>
            switch options.mapping(for: nic.network)?.target {
            case .bridge(let name): (type, source) = ("bridge", ["bridge": name])
            case .network(let name): (type, source) = ("network", ["network": name])
            case nil:
                throw MigrationError(
                    .failedPrecondition, "\(nic.id): network \"\(nic.network)\" is mapped to nothing",
                    hint: "map it with --network")
            }
            guard nic.mac.isEmpty || isUnicastMAC(nic.mac) else {
                throw MigrationError(.invalidArgument, "\(nic.id): \"\(nic.mac)\" is not a NIC's MAC address")
            }
            xml.element("interface", ["type": type]) { xml in
                if !nic.mac.isEmpty { xml.element("mac", ["address": nic.mac.lowercased()]) }
                xml.element("source", source)
                xml.element("model", ["type": options.nicModel(for: vm)])
                if !nic.connected { xml.element("link", ["state": "down"]) }
                if let order = boot.nics[nic.id] { xml.element("boot", ["order": "\(order)"]) }
            }
        }
    }

    /// A serial console, and a screen on a Unix socket: VNC on a TCP port, even a local one, would let every user of
    /// the host into the guest.
    func writeConsole(_ xml: inout XMLWriter) {
        xml.element("serial", ["type": "pty"]) { xml in
            if let consoleLog { xml.element("log", ["file": consoleLog, "append": "off"]) }
            xml.element("target", ["type": "isa-serial", "port": "0"])
        }
        xml.element("console", ["type": "pty"]) { $0.element("target", ["type": "serial", "port": "0"]) }
        xml.element("channel", ["type": "unix"]) {
            $0.element("target", ["type": "virtio", "name": "org.qemu.guest_agent.0"])
        }
        xml.element("input", ["type": "tablet", "bus": "usb"])
        xml.element("graphics", ["type": "vnc"]) { $0.element("listen", ["type": "socket"]) }
        // Plain VGA: every firmware and guest has a driver for it.
        xml.element("video") { $0.element("model", ["type": "vga", "primary": "yes"]) }
    }

    func writePlatform(_ xml: inout XMLWriter) {
        if vm.tpm && tpmEmulator {
            xml.element("tpm", ["model": "tpm-crb"]) {
                $0.element("backend", ["type": "emulator", "version": "2.0"])
            }
        }
        // All memory is pinned by VFIO; a balloon could only take it away from under the device. A system of i440fx's time
        // has no drivers for either, and asks for them at every start.
        xml.element("memballoon", ["model": hasHostDevices || isI440FX ? "none" : "virtio"])
        if isI440FX { return }
        xml.element("rng", ["model": "virtio"]) { $0.element("backend", ["model": "random"], text: "/dev/urandom") }
    }
}

/// "a" … "z", "aa" …, as the kernel letters disks.
func diskLetters(_ index: Int) -> String {
    var (index, letters) = (index, "")
    repeat {
        letters = String(UnicodeScalar(UInt8(97 + index % 26))) + letters
        index = index / 26 - 1
    } while index >= 0
    return letters
}

private func isUnicastMAC(_ text: String) -> Bool {
    let bytes = text.split(separator: ":", omittingEmptySubsequences: false)
    guard bytes.count == 6, bytes.allSatisfy({ $0.count == 2 && $0.allSatisfy { $0.isASCII && $0.isHexDigit } }),
        let first = UInt8(bytes[0], radix: 16)
    else { return false }
    return first & 1 == 0
}
