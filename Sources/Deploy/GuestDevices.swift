package import FlotillaProtocol
package import HostKit
import MigrationModel

/// What a guest's kernel has on its PCI bus.
package struct GuestDevice: Hashable, Sendable {
    package var vendor: UInt32
    package var device: UInt32

    /// "10de:20f1".
    package var text: String { "\(fourDigits(vendor)):\(fourDigits(device))" }
}

/// The PCI devices that a guest sees, through its QEMU agent: `guest-exec` of a shell that reads sysfs, or of Windows'
/// PowerShell that asks plug and play. What runs is the same for every guest.
///
/// - Parameter ask: sends a command to the agent and returns its answer.
/// - Throws: `failedPrecondition` when the agent may not run programs or the program fails; `deadlineExceeded`.
package func guestDevices(
    windows: Bool, timeout: Duration, stop: StopFlag, ask: (String) throws -> String
) throws -> [GuestDevice] {
    let (program, arguments) = windows ? askingWindows : askingLinux
    let output = try runInGuest(
        program, arguments, to: "list its PCI devices",
        hint: "allow guest-exec in the guest's qemu-guest-agent, or migrate without the GPU check",
        timeout: timeout, stop: stop, ask: ask)
    return windows ? parseWindowsDevices(output) : parseGuestDevices(output)
}

private let askingLinux = (
    "/bin/sh",
    ["-c", "for d in /sys/bus/pci/devices/*; do read v < $d/vendor && read i < $d/device && echo $v $i; done"]
)

/// Win32_PnPEntity has the devices that are there now. PowerShell 2 (Windows 7, Server 2008 R2) knows no CIM.
private let askingWindows = (
    "powershell.exe",
    [
        "-NoProfile", "-NonInteractive", "-Command",
        "$ErrorActionPreference = 'Stop'; "
            + "if (Get-Command Get-CimInstance -ErrorAction SilentlyContinue) { $all = Get-CimInstance Win32_PnPEntity } "
            + "else { $all = Get-WmiObject Win32_PnPEntity }; foreach ($one in $all) { $one.PNPDeviceID }",
    ]
)

/// Throws `failedPrecondition` naming each handed over device that the guest does not see, by vendor and device id and
/// their number. A vGPU shows the guest a device id of the vendor's choice: of those only the vendor counts.
package func requireVisible(_ functions: [PciFunction], vgpus: Int, in seen: [GuestDevice]) throws {
    var left = seen
    var missing: [String] = []
    for function in functions {
        let wanted = GuestDevice(vendor: function.id.vendor, device: function.id.device)
        if let index = left.firstIndex(of: wanted) {
            left.remove(at: index)
        } else {
            missing.append("\(wanted.text) (\(function.address) on the host)")
        }
    }
    let nvidia = left.filter { $0.vendor == 0x10de }.count
    if nvidia < vgpus { missing.append("\(vgpus - nvidia) of \(vgpus) vGPUs") }
    guard missing.isEmpty else {
        throw MigrationError(
            .failedPrecondition, "the guest does not see \(missing.joined(separator: ", "))",
            hint: "look at the guest's kernel log and at the domain's log in /var/log/libvirt/qemu")
    }
}

func parseGuestDevices(_ text: String) -> [GuestDevice] {
    text.split(whereSeparator: \.isNewline).prefix(4096).compactMap { line in
        let numbers = line.split(separator: " ").map { UInt32($0.hasPrefix("0x") ? $0.dropFirst(2) : $0, radix: 16) }
        guard numbers.count == 2, let vendor = numbers[0], let device = numbers[1] else { return nil }
        return GuestDevice(vendor: vendor, device: device)
    }
}

/// Lines such as "PCI\VEN_10DE&DEV_20F1&SUBSYS_145F10DE&REV_A1\4&2F8B2A5&0&0009"; those of other buses ("ACPI\VEN_…",
/// "USB\VID_…") are none. Also of a console that writes UTF-16.
func parseWindowsDevices(_ text: String) -> [GuestDevice] {
    text.split(whereSeparator: \.isNewline).prefix(65_536).compactMap { line in
        // A byte order mark, and UTF-16's other halves.
        let id = line.filter { $0.isASCII && $0 != "\0" }.trimmingPrefix { $0.isWhitespace }.uppercased()
        guard id.hasPrefix(#"PCI\VEN_"#) else { return nil }
        func number(_ key: String) -> UInt32? {
            guard let range = id.firstRange(of: key) else { return nil }
            let digits = id[range.upperBound...].prefix(4)
            return digits.count == 4 && digits.allSatisfy(\.isHexDigit) ? UInt32(digits, radix: 16) : nil
        }
        guard let vendor = number(#"\VEN_"#), let device = number("&DEV_") else { return nil }
        return GuestDevice(vendor: vendor, device: device)
    }
}

private func fourDigits(_ number: UInt32) -> String {
    let text = String(number, radix: 16)
    return String(repeating: "0", count: max(0, 4 - text.count)) + text
}
