package import FlotillaProtocol
import FoundationEssentials
import Glibc
package import HostKit
import MigrationModel

/// What a guest's kernel has on its PCI bus.
package struct GuestDevice: Hashable, Sendable {
    package var vendor: UInt32
    package var device: UInt32

    /// "10de:20f1".
    package var text: String { "\(fourDigits(vendor)):\(fourDigits(device))" }
}

/// The PCI devices that a Linux guest sees, through its QEMU agent (`guest-exec` of a shell that reads sysfs).
///
/// - Parameter ask: sends a command to the agent and returns its answer.
/// - Throws: `failedPrecondition` when the agent may not run programs or the program fails; `deadlineExceeded`.
package func guestDevices(
    timeout: Duration, stop: StopFlag, ask: (String) throws -> String
) throws -> [GuestDevice] {
    let script =
        "for d in /sys/bus/pci/devices/*; do read v < $d/vendor && read i < $d/device && echo $v $i; done"
    let hint = "allow guest-exec in the guest's qemu-guest-agent, or migrate without the GPU check"
    let started: Started = try answer(
        ask(
            #"{"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c","\#(script)"],"capture-output":true}}"#)
    )
    let deadline = ContinuousClock().now + timeout
    while true {
        try stop.check()
        let status: Status = try answer(
            ask(#"{"execute":"guest-exec-status","arguments":{"pid":\#(started.pid)}}"#))
        if status.exited {
            guard status.exitcode == 0 else {
                throw MigrationError(
                    .failedPrecondition, "the guest could not list its PCI devices (exit \(status.exitcode ?? -1))",
                    hint: hint)
            }
            let bytes = status.output.flatMap { Data(base64Encoded: $0) } ?? Data()
            return parseGuestDevices(String(decoding: bytes, as: UTF8.self))
        }
        guard ContinuousClock().now < deadline else {
            throw MigrationError(
                .deadlineExceeded, "the guest did not list its PCI devices within \(timeout)", hint: hint)
        }
        // The agent has no way to wait for the program's end.
        poll(nil, 0, 100)
    }
}

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
    text.split(separator: "\n").prefix(4096).compactMap { line in
        let numbers = line.split(separator: " ").map { UInt32($0.hasPrefix("0x") ? $0.dropFirst(2) : $0, radix: 16) }
        guard numbers.count == 2, let vendor = numbers[0], let device = numbers[1] else { return nil }
        return GuestDevice(vendor: vendor, device: device)
    }
}

private struct Started: Decodable { var pid: Int }

private struct Status: Decodable {
    var exited: Bool
    var exitcode: Int?
    var output: String?

    private enum CodingKeys: String, CodingKey {
        case exited, exitcode
        case output = "out-data"
    }
}

private struct Answer<Value: Decodable>: Decodable { var `return`: Value }

private func answer<Value: Decodable>(_ text: String) throws -> Value {
    // A guest is not trusted: libvirt bounds the answer at 10 MB, what is wanted has a few hundred bytes.
    guard text.utf8.count <= 1 << 20, let answer = try? JSONDecoder().decode(Answer<Value>.self, from: Data(text.utf8))
    else {
        throw MigrationError(.failedPrecondition, "the guest agent gave an answer that can't be read")
    }
    return answer.return
}

private func fourDigits(_ number: UInt32) -> String {
    let text = String(number, radix: 16)
    return String(repeating: "0", count: max(0, 4 - text.count)) + text
}
