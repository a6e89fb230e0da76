import Export
import FlotillaProtocol
import MigrationModel

extension VMCapture {
    /// Every device that is neither disk, network card nor passthrough device. What isn't known is named, not dropped.
    mutating func capturePorts() {
        for device in orderedDevices {
            let label = (device["deviceInfo"]?.text("label") ?? device.type).printable
            let backing = device["backing"]
            switch device.type {
            case "VirtualCdrom", "VirtualFloppy":
                var removable = Removable()
                removable.kind = device.type == "VirtualCdrom" ? .cdrom : .floppy
                removable.backing = backing?.text("fileName") ?? backing?.text("deviceName") ?? ""
                removable.connected = device["connectable"]?.flag("startConnected") ?? false
                manifest.vm.removables.append(removable)
            case "VirtualSerialPort":
                var port = SerialPort()
                port.backingKind = Self.serialKind(backing?.type ?? "")
                port.backing =
                    backing?.text("fileName") ?? backing?.text("pipeName") ?? backing?.text("serviceURI")
                    ?? backing?.text("deviceName") ?? ""
                manifest.vm.serialPorts.append(port)
                if port.backingKind != "thinprint" {
                    manifest.warn(
                        "vm",
                        "\(label) is connected to \(port.backingKind) '\(port.backing.printable)' of the source",
                        remedy: "connect the target's serial port where you need it")
                }
            case "VirtualParallelPort":
                manifest.warn("vm", "\(label) is not carried", remedy: "add a parallel port on the target if needed")
            case "VirtualUSB":
                var usb = UsbDevice()
                usb.backing = backing?.text("deviceName") ?? label
                usb.vendorID = UInt32(clamping: device.number("vendor") ?? 0)
                usb.productID = UInt32(clamping: device.number("product") ?? 0)
                manifest.vm.usbDevices.append(usb)
                manifest.warn(
                    "vm", "the host's USB device '\(usb.backing.printable)' is not carried",
                    remedy: "plug it into the target host and attach it there")
            case "VirtualTPM":
                manifest.vm.tpm = true
                manifest.warn(
                    "vm", "its virtual TPM's secrets can't be carried; the target gets an empty TPM 2.0",
                    remedy: "have recovery keys (BitLocker, LUKS) at hand, or suspend the encryption before moving")
            case "VirtualMachineVideoCard":
                let (bytes, overflow) = UInt64(clamping: device.number("videoRamSizeInKB") ?? 0)
                    .multipliedReportingOverflow(by: 1024)
                manifest.vm.videoMemoryBytes = overflow ? 0 : bytes
            case "VirtualNVDIMM":
                manifest.block(
                    "vm", "\(label) is persistent memory, whose content no export carries",
                    remedy: "move its content to a disk inside the guest and remove it")
            case "VirtualSCSIPassthrough":
                manifest.block(
                    "vm", "\(label) is a SCSI device of the source host", remedy: "remove it from the VM on the source")
            case "VirtualSoundCard", "VirtualEnsoniq1371", "VirtualSoundBlaster16", "VirtualHdAudioCard":
                manifest.note("vm", "\(label) (sound) is not carried")
            default:
                guard !Self.isKnown(device.type) else { continue }
                manifest.warn(
                    "vm", "\(label) (\(device.type.printable)) is a device this program doesn't know; not carried",
                    remedy: "add what the guest needs on the target")
            }
        }
    }

    /// Disks, network cards and passthrough devices, handled elsewhere, and what every machine has.
    private static func isKnown(_ type: String) -> Bool {
        let ordinary: Set<String> = [
            "VirtualDisk", "VirtualPCIPassthrough", "VirtualKeyboard", "VirtualPointingDevice", "VirtualPCIController",
            "VirtualPS2Controller", "VirtualSIOController", "VirtualMachineVMCIDevice", "VirtualUSBController",
            "VirtualUSBXHCIController", "VirtualWDT", "VirtualPrecisionClock", "VirtualVmxnet3", "VirtualVmxnet3Vrdma",
            "VirtualE1000e", "VirtualE1000", "VirtualPCNet32", "VirtualVmxnet2", "VirtualVmxnet",
            "VirtualSriovEthernetCard", "VirtualTrackpad", "VirtualController",
        ]
        return ordinary.contains(type) || ControllerKind(type: type) != nil
    }

    private static func serialKind(_ type: String) -> String {
        switch type {
        case "VirtualSerialPortFileBackingInfo": "file"
        case "VirtualSerialPortPipeBackingInfo": "pipe"
        case "VirtualSerialPortURIBackingInfo": "network"
        case "VirtualSerialPortThinPrintBackingInfo": "thinprint"
        default: "device"
        }
    }

    mutating func captureBootOrder() {
        for entry in content["config.bootOptions"]?.all("bootOrder") ?? [] {
            let label = entry.number("deviceKey").flatMap { labels[$0] }
            switch entry.type {
            case "VirtualMachineBootOptionsBootableDiskDevice":
                if let label { manifest.vm.bootOrder.append("disk:\(label)") }
            case "VirtualMachineBootOptionsBootableEthernetDevice":
                if let label { manifest.vm.bootOrder.append("net:\(label)") }
            case "VirtualMachineBootOptionsBootableCdromDevice": manifest.vm.bootOrder.append("cdrom")
            case "VirtualMachineBootOptionsBootableFloppyDevice": manifest.vm.bootOrder.append("floppy")
            default: break
            }
        }
        let named = manifest.vm.bootOrder.first { $0.hasPrefix("disk:") }.map { String($0.dropFirst(5)) }
        let bootDisk = named ?? manifest.disks.first?.label
        for index in manifest.disks.indices { manifest.disks[index].boot = manifest.disks[index].label == bootDisk }
    }
}
