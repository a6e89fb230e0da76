import Deploy
import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import Testing

/// The question to the guest against a stand-in agent.
@Suite struct GuestDevicesTests {
    static func agent(_ output: String, exit: Int = 0, after polls: Int = 2) -> (String) throws -> String {
        var left = polls
        return { command in
            if !command.contains("guest-exec-status") { return #"{"return":{"pid":42}}"# }
            left -= 1
            if left > 0 { return #"{"return":{"exited":false}}"# }
            let data = Data(output.utf8).base64EncodedString()
            return #"{"return":{"exited":true,"exitcode":\#(exit),"out-data":"\#(data)"}}"#
        }
    }

    func a100(_ address: String) -> PciFunction {
        .with {
            $0.address = address
            $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20f1) }
        }
    }

    @Test func countsByVendorAndDevice() throws {
        let seen = try guestDevices(
            windows: false, timeout: .seconds(5), stop: StopFlag(),
            ask: Self.agent("0x8086 0x29c0\n0x10de 0x20f1\nrubbish\n0x10de 0x20f1\n"))
        #expect(seen.map(\.text) == ["8086:29c0", "10de:20f1", "10de:20f1"])
        try requireVisible([a100("0000:3b:00.0"), a100("0000:5e:00.0")], vgpus: 0, in: seen)
        try requireVisible([a100("0000:3b:00.0")], vgpus: 1, in: seen)
        let error = #expect(throws: MigrationError.self) {
            try requireVisible([a100("0000:3b:00.0"), a100("0000:5e:00.0")], vgpus: 1, in: seen)
        }
        #expect(error?.message.contains("1 of 1 vGPUs") == true)
        let third = #expect(throws: MigrationError.self) {
            try requireVisible([a100("0000:3b:00.0"), a100("0000:5e:00.0"), a100("0000:af:00.0")], vgpus: 0, in: seen)
        }
        #expect(third?.message.contains("10de:20f1 (0000:af:00.0 on the host)") == true)
    }

    /// Plug and play's names, as a Windows guest of QEMU's q35 lists them.
    static let windows = [
        #"ACPI\PNP0A08\0"#, #"ACPI\GENUINEINTEL_-_INTEL64_FAMILY_6_MODEL_85\_0"#, #"ACPI\VEN_ABCD&DEV_0001\0"#,
        #"PCI\VEN_8086&DEV_29C0&SUBSYS_11001AF4&REV_00\3&11583659&0&00"#, "",
        #"PCI\VEN_10DE&DEV_20F1&SUBSYS_145F10DE&REV_A1\4&2F8B2A5&0&0009"#,
        #"SCSI\DISK&VEN_QEMU&PROD_HARDDISK\4&35424867&0&000000"#, #"USB\VID_0627&PID_0001\28754-0000:00:1D.7-1"#,
        #"pci\ven_10de&dev_20f1&subsys_145f10de&rev_a1\4&2f8b2a5&0&000a"#, #"PCI\VEN_10DE"#, #"PCI\VEN_10DE&DEV_20"#,
        #"PCI\VEN_XXXX&DEV_20F1\0"#, "Get-CimInstance : PCI\\VEN_10DE&DEV_20F1", "\u{FFFD}",
    ]

    @Test(arguments: ["\r\n", "\n", "\r\r\n"]) func windowsNamesItsDevices(_ end: String) throws {
        var asked: [String] = []
        let agent = Self.agent(Self.windows.joined(separator: end) + end)
        let seen = try guestDevices(windows: true, timeout: .seconds(5), stop: StopFlag()) { command in
            asked.append(command)
            return try agent(command)
        }
        #expect(seen.map(\.text) == ["8086:29c0", "10de:20f1", "10de:20f1"])
        try requireVisible([a100("0000:3b:00.0"), a100("0000:5e:00.0")], vgpus: 0, in: seen)
        let sent = try #require(try JSONSerialization.jsonObject(with: Data(asked[0].utf8)) as? [String: Any])
        let arguments = try #require(sent["arguments"] as? [String: Any])
        #expect(arguments["path"] as? String == "powershell.exe" && arguments["capture-output"] as? Bool == true)
        // Quotation marks would not survive every agent's way to a Windows command line.
        #expect((arguments["arg"] as? [String])?.allSatisfy { !$0.contains("\"") } == true)
    }

    @Test func windowsThatWritesUTF16() throws {
        let units = Array(Self.windows.joined(separator: "\r\n").utf16)
        let bytes = units.reduce(into: [0xff, 0xfe] as [UInt8]) { $0 += [UInt8($1 & 0xff), UInt8($1 >> 8)] }
        let agent: (String) throws -> String = { command in
            command.contains("guest-exec-status")
                ? #"{"return":{"exited":true,"exitcode":0,"out-data":"\#(Data(bytes).base64EncodedString())"}}"#
                : #"{"return":{"pid":1}}"#
        }
        let seen = try guestDevices(windows: true, timeout: .seconds(5), stop: StopFlag(), ask: agent)
        #expect(seen.map(\.text) == ["8086:29c0", "10de:20f1", "10de:20f1"])
    }

    @Test func linuxWithWindowsLineEnds() throws {
        let seen = try guestDevices(
            windows: false, timeout: .seconds(5), stop: StopFlag(),
            ask: Self.agent("0x8086 0x29c0\r\n0x10de 0x20f1\r\n"))
        #expect(seen.map(\.text) == ["8086:29c0", "10de:20f1"])
    }

    @Test func refusalsOfTheAgent() {
        for (agent, code) in [
            (Self.agent("", exit: 127), MigrationError.Code.failedPrecondition), ({ _ in "{}" }, .failedPrecondition),
            (Self.agent("", after: 1_000_000), .deadlineExceeded),
        ] {
            let error = #expect(throws: MigrationError.self) {
                try guestDevices(windows: false, timeout: .milliseconds(250), stop: StopFlag(), ask: agent)
            }
            #expect(error?.code == code)
        }
    }

    /// The guest runs what the host recorded, as often, without a shell in between.
    @Test func benchmarkAgainstTheBaseline() throws {
        let baseline = GPUBaseline(
            name: "gemm", command: ["/opt/gemm", "--size", "8 \"192\""], pattern: "GFLOPS ([0-9.]+)",
            figures: [100, 100, 100])
        var asked: [String] = []
        func run(_ output: String, tolerance: Double = 2) throws -> GpuBenchmark {
            asked = []
            return try benchmarkGuest(baseline, tolerance: tolerance, stop: StopFlag()) { command in
                if !command.contains("guest-exec-status") { asked.append(command) }
                return try Self.agent(output, after: 1)(command)
            }
        }
        let result = try run("GFLOPS 98.5")
        #expect((result.figure, result.baseline, result.lossPercent) == (98.5, 100, 1.5))
        #expect(asked.count == 3)
        let sent = try #require(try JSONSerialization.jsonObject(with: Data(asked[0].utf8)) as? [String: Any])
        let arguments = try #require(sent["arguments"] as? [String: Any])
        #expect(arguments["path"] as? String == "/opt/gemm")
        #expect(arguments["arg"] as? [String] == ["--size", "8 \"192\""])

        let slow = #expect(throws: MigrationError.self) { try run("GFLOPS 97.5") }
        #expect(slow?.code == .failedPrecondition)
        #expect(slow?.message.contains("gemm 97.5, bare metal 100.0 (2.5 % worse, 2.0 % allowed)") == true)
        #expect(try run("GFLOPS 97.5", tolerance: 3).lossPercent == 2.5)
        #expect(try run("GFLOPS 120").lossPercent == -20)
        #expect(throws: MigrationError.self) { try run("no device") }
    }
}
