import FlotillaProtocol
import Foundation
import HostKit
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

/// Runs `body` with a folder that is removed afterwards.
func withFolder<Value>(_ body: (String) throws -> Value) throws -> Value {
    let path = "\(NSTemporaryDirectory())/flotilla-test-\(UUID().uuidString)"
    try Files.createDirectories(path)
    defer { try? Files.remove(path) }
    return try body(path)
}

/// The recorded tree of a q35 machine with VT-d on: GPU and audio in a slot, a boot VGA, SR-IOV, a shared group.
func withRecordedMachine<Value>(_ body: (Sysfs) throws -> Value) throws -> Value {
    try withFolder { folder in
        try unpackRecordedMachine(to: folder)
        return try body(Sysfs(root: folder))
    }
}

func unpackRecordedMachine(to folder: String) throws {
    let archive = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "Fixtures/sysfs-q35-vtd.tgz")
    try #require(try Program.run("/usr/bin/tar", ["xzf", archive.path, "-C", folder]).status == 0)
}

func function(
    _ address: String, _ vendor: UInt32, _ device: UInt32, _ classCode: UInt32 = 0x0302, driver: String = "nvidia",
    group: Int32, companions: [String] = [], _ change: (inout PciFunction) -> Void = { _ in }
) -> PciFunction {
    var function = PciFunction.with {
        $0.address = address
        $0.id = .with { ($0.vendor, $0.device) = (vendor, device) }
        $0.classCode = classCode
        $0.driver = driver
        $0.iommuGroup = group
        $0.numaNode = -1
        $0.companions = companions
    }
    change(&function)
    return function
}

/// Two A100 with groups of their own, one RTX with its audio function, an A40 that shares a group with a NIC.
func gpuHost(_ change: (inout HostProfile) -> Void = { _ in }) -> HostProfile {
    var host = HostProfile.with {
        $0.name = "kvm1"
        $0.iommuEnabled = true
        $0.vfioAvailable = true
        $0.domainType = "kvm"
        $0.cpus = 64
        $0.memoryBytes = 512 << 30
        $0.efiFirmware = true
        $0.secureBootFirmware = true
        $0.networks = ["default"]
        $0.bridges = ["br0"]
        $0.pools = [.with { ($0.name, $0.path, $0.writable, $0.freeBytes) = ("main", "/pool", true, 1 << 40) }]
        $0.pciFunctions = [
            function("0000:00:00.0", 0x8086, 0x29c0, 0x0600, driver: "", group: 0) { $0.bridge = true },
            function("0000:3b:00.0", 0x10de, 0x20f1, group: 42),
            function("0000:5e:00.0", 0x10de, 0x20f1, group: 43, companions: []),
            function("0000:86:00.0", 0x10de, 0x2204, 0x0300, group: 50, companions: ["0000:86:00.1"]),
            function(
                "0000:86:00.1", 0x10de, 0x1aef, 0x0403, driver: "snd_hda_intel", group: 50, companions: ["0000:86:00.0"]
            ),
            function("0000:af:00.0", 0x10de, 0x2235, group: 60),
            function("0000:b0:00.0", 0x8086, 0x1572, 0x0200, driver: "i40e", group: 60),
            function("0000:ae:00.0", 0x8086, 0x2030, 0x0604, driver: "pcieport", group: 60) { $0.bridge = true },
        ]
    }
    change(&host)
    return host
}

func passthrough(_ id: String, _ vendor: UInt32, _ device: UInt32, address: String = "", classCode: UInt32 = 0x0302)
    -> AssignedDevice
{
    .with {
        $0.id = id
        $0.classCode = classCode
        $0.passthrough = .with {
            $0.id = .with { ($0.vendor, $0.device) = (vendor, device) }
            $0.address = address
        }
    }
}

func dynamic(_ id: String, _ allowed: [(UInt32, UInt32)]) -> AssignedDevice {
    .with {
        $0.id = id
        $0.classCode = 0x0302
        $0.dynamic = .with {
            $0.allowed = allowed.map { pair in .with { ($0.vendor, $0.device) = pair } }
        }
    }
}

/// A host with this machine's devices as a worker tells of them.
///
/// - Parameter gpus: buses whose GPU gets NVIDIA's driver, if it has none.
func captured(_ machine: VgpuMachine, _ gpus: [String] = []) throws -> HostProfile {
    for bus in gpus where machine.sysfs.linkName("bus/pci/devices/0000:\(bus):00.0/driver") == nil {
        let link = machine.sysfs.path("bus/pci/devices/0000:\(bus):00.0/driver")
        try #require(symlink("../../drivers/nvidia", link) == 0)
    }
    var host = gpuHost()
    host.pciFunctions = try pciInventory(sysfs: machine.sysfs)
    addDetail(&host.pciFunctions, sysfs: machine.sysfs)
    try addVgpus(&host.pciFunctions, of: machine.host())
    return host
}
