import FlotillaProtocol
import MigrationModel

extension VMXCapture {
    /// Floppy drives, serial ports and USB devices.
    mutating func capturePorts() throws {
        for number in indices("floppy") {
            let key = "floppy\(number)"
            guard try file.flag("\(key).present") ?? (file.text("\(key).fileName") != nil) else { continue }
            var removable = Removable()
            removable.kind = .floppy
            removable.backing = file["\(key).fileName"] ?? ""
            removable.connected = try file.flag("\(key).startConnected") ?? true
            manifest.vm.removables.append(removable)
        }
        for number in indices("serial") {
            let key = "serial\(number)"
            guard try file.flag("\(key).present") == true else { continue }
            var port = SerialPort()
            port.backingKind = file.text("\(key).fileType")?.lowercased() ?? "device"
            port.backing = file["\(key).fileName"] ?? ""
            manifest.vm.serialPorts.append(port)
            if port.backingKind != "thinprint" {
                manifest.warn(
                    key,
                    "\(key) is connected to \(port.backingKind.printable) '\(port.backing.printable)' of the source",
                    remedy: "connect the target's serial port where you need it")
            }
        }
        for number in indices("parallel") where try file.flag("parallel\(number).present") == true {
            manifest.warn("vm", "its parallel port \(number) is not carried", remedy: "add one on the target if needed")
        }
        for entry in file.entries where entry.key.lowercased().hasPrefix("usb.autoconnect.device") {
            guard !entry.value.isEmpty else { continue }
            guard manifest.vm.usbDevices.count < 64 else {
                throw MigrationError(.invalidArgument, "\(file.name): line \(entry.line): more than 64 USB devices")
            }
            var device = UsbDevice()
            device.backing = entry.value
            for word in entry.value.lowercased().split(separator: " ") {
                if word.hasPrefix("vid:") { device.vendorID = UInt32(word.dropFirst(4), radix: 16) ?? 0 }
                if word.hasPrefix("pid:") { device.productID = UInt32(word.dropFirst(4), radix: 16) ?? 0 }
            }
            manifest.vm.usbDevices.append(device)
            manifest.warn(
                "vm", "the host's USB device '\(entry.value.printable)' is not carried",
                remedy: "plug it into the target host and attach it there")
        }
    }

    /// `bios.bootOrder` lists kinds, `bios.hddOrder` the disks among them.
    mutating func captureBootOrder() {
        func list(_ key: String) -> [String] {
            (file.text(key) ?? "").lowercased().split(separator: ",").prefix(64).map { String($0).trimmed }
        }
        let labels = manifest.disks.map(\.label)
        let first = list("bios.hddOrder").filter(labels.contains)
        let disks = first + labels.filter { !first.contains($0) }
        for kind in list("bios.bootOrder") {
            switch kind {
            case "hdd": manifest.vm.bootOrder += disks.map { "disk:\($0)" }
            case "cdrom", "cd", "floppy", "fd": manifest.vm.bootOrder.append(kind.hasPrefix("c") ? "cdrom" : "floppy")
            case let kind where kind.hasPrefix("ethernet"): manifest.vm.bootOrder.append("net:\(kind)")
            default: break
            }
        }
        if manifest.vm.bootOrder.isEmpty && !first.isEmpty {
            manifest.vm.bootOrder = disks.map { "disk:\($0)" }
        }
        let bootDisk =
            manifest.vm.bootOrder.first { $0.hasPrefix("disk:") }.map { String($0.dropFirst(5)) } ?? disks.first
        for index in manifest.disks.indices { manifest.disks[index].boot = manifest.disks[index].label == bootDisk }
    }

    private func indices(_ prefix: String) -> [Int] {
        Set(file.entries.compactMap { Self.index(of: $0.key, prefix: prefix) }).sorted()
    }
}
