import Deploy
import FlotillaProtocol
import Foundation
import HostKit
import SwiftProtobuf
import Testing

/// Runs `body` with a folder that is removed afterwards.
func withFolder<Value>(_ body: (String) throws -> Value) throws -> Value {
    let path = "\(NSTemporaryDirectory())/flotilla-test-\(UUID().uuidString)"
    try Files.createDirectories(path)
    defer { try? Files.remove(path) }
    return try body(path)
}

/// A program's exit status and what it printed.
func run(_ program: String, _ arguments: [String]) throws -> (status: Int32, output: String) {
    let process = Process()
    process.executableURL = URL(filePath: program)
    process.arguments = arguments
    let pipe = Pipe()
    (process.standardOutput, process.standardError) = (pipe, pipe)
    try process.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (process.terminationStatus, String(decoding: output, as: UTF8.self))
}

func host(_ domainType: String = "kvm") -> HostProfile {
    .with { ($0.name, $0.domainType) = ("kvm1", domainType) }
}

/// A Linux VM with one disk and one NIC. Its name differs per migration id, since libvirt's test driver is one per process.
func linuxVM(
    _ migrationID: String = "11111111-2222-4333-8444-555555555555", _ change: (inout Manifest) -> Void = { _ in }
)
    -> Manifest
{
    var manifest = Manifest.with {
        $0.schemaVersion = 1
        $0.migrationID = migrationID
        $0.vm = .with {
            $0.name = "demo web"
            $0.biosUuid = "564D1B2C-0000-4000-8000-0123456789AB"
            $0.guestID = "debian12_64Guest"
            $0.firmware = .bios
            $0.cpu = .with { ($0.count, $0.coresPerSocket) = (4, 2) }
            $0.memory.bytes = 4 << 30
        }
        $0.disks = [disk(0, .pvscsi)]
        $0.nics = [
            .with {
                ($0.id, $0.mac, $0.network, $0.model, $0.connected) = (
                    "nic0", "00:50:56:01:02:03", "VM Network", "vmxnet3", true
                )
            }
        ]
    }
    change(&manifest)
    return manifest
}

func disk(_ unit: UInt32, _ controller: DiskController, format: String = "qcow2") -> Disk {
    .with {
        $0.id = "disk\(unit)"
        $0.capacityBytes = 10 << 30
        $0.controller = controller
        $0.unitNumber = unit
        $0.uuid = "6000C29a-1234-5678-9abc-def01234567\(unit)"
        $0.target = .with { ($0.path, $0.format) = ("/var/lib/flotilla/pool/web-disk\(unit).\(format)", format) }
    }
}

func mapped(_ change: (inout DeployOptions) -> Void = { _ in }) -> DeployOptions {
    var options = DeployOptions.with {
        $0.networks = [
            .with { ($0.source, $0.bridge) = ("VM Network", "br0") },
            .with { ($0.source, $0.network) = ("Storage", "default") },
        ]
    }
    change(&options)
    return options
}

func pci(_ address: String, bars: UInt64 = 0, node: Int32 = -1) -> PciFunction {
    .with { ($0.address, $0.largeBarBytes, $0.numaNode) = (address, bars, node) }
}

/// 16 CPUs and 64 GiB each.
let twoNodes: [NumaNode] = (0..<2).map { id in
    .with { ($0.id, $0.cpus, $0.memoryBytes) = (id, Array(id * 16..<id * 16 + 16), 64 << 30) }
}
