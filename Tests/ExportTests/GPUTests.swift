import FlotillaProtocol
import MigrationModel
import TestKit
import Testing

@testable import Export

@Suite struct GPUTests {
    @Test(
        arguments: [
            ("00000:026:01.2", "0000:1a:01.2"), ("00000:175:00.0", "0000:af:00.0"), ("00001:059:31.7", "0001:3b:1f.7"),
            ("0000:AF:00.0", "0000:af:00.0"), ("0000:3b:00.0", "0000:3b:00.0"), ("0000:26:00.0", "0000:26:00.0"),
            ("06:00.0", "0000:06:00.0"), ("130:00.0", "0000:82:00.0"), ("3b:1f.0", "0000:3b:1f.0"),
            ("09:09.7", "0000:09:09.7"), ("255:00.0", "0000:ff:00.0"), ("26:00.0", nil), ("06:10.0", nil),
            ("00000:300:00.0", nil), ("0000:3b:20.0", nil), ("06:00.8", nil), ("06:00", nil), ("", nil), ("x:y.z", nil),
            ("0000:3b:00.0 ", nil), ("-1:00.0", nil), ("1:2:3:4.5", nil), ("06:00.0.0", nil), ("::.", nil),
        ] as [(String, String?)])
    func addresses(_ text: String, _ expected: String?) { #expect(PCIText.address(text) == expected) }

    @Test(
        arguments: [
            ("0x10de", 0x10de), ("0X10DE", 0x10de), ("0x0", 0), ("10de", 0x10de), ("-32634", 0x8086), ("4318", nil),
            ("20f1", 0x20f1), ("0x1ffff", nil), ("0x", nil), ("", nil), ("10deg", nil), ("-40000", nil),
        ] as [(String, UInt32?)])
    func identifiers(_ text: String, _ expected: UInt32?) { #expect(PCIText.identifier(text) == expected) }

    @Test(
        arguments: [
            ("0x0302", 0x0302), ("0x300", 0x0300), ("0x030200", 0x0302), ("0380", 0x0380), ("0x1", nil), ("vga", nil),
        ] as [(String, UInt32?)])
    func classes(_ text: String, _ expected: UInt32?) { #expect(PCIText.classCode(text) == expected) }

    private func assign(_ devices: [[String: String]]) throws -> Manifest {
        var manifest = Manifest()
        try manifest.assign(
            devices.enumerated().map { index, values in
                var keys = PassthroughKeys(label: "pciPassthru\(index)")
                for (key, value) in values.sorted(by: { $0.key < $1.key }) { keys.set(key, value) }
                return keys
            })
        return manifest
    }

    @Test func fixedDevice() throws {
        let manifest = try assign([
            [
                "present": "TRUE", "id": "00000:059:00.0", "deviceId": "0x20b5", "vendorId": "0x10de",
                "subDeviceId": "0x1533", "subVendorId": "0x10de", "class": "0x0302", "systemId": "5f1e-host",
                "pciSlotNumber": "256", "msiEnabled": "TRUE", "cfg.enable_uvm": "1", "cfg.gpu-pci-id": "0000:3b:00.0",
            ]
        ])
        let gpu = try #require(manifest.gpus.first)
        #expect(gpu.id == "gpu0" && gpu.label == "pciPassthru0" && gpu.classCode == 0x0302)
        #expect(gpu.passthrough.address == "0000:3b:00.0" && gpu.passthrough.rawAddress == "00000:059:00.0")
        #expect(gpu.passthrough.systemID == "5f1e-host" && gpu.passthrough.id.device == 0x20b5)
        #expect(gpu.passthrough.id.subsystemDevice == 0x1533 && gpu.guestSlot == 256 && gpu.msiEnabled)
        #expect(gpu.config == ["cfg.enable_uvm": "1", "cfg.gpu-pci-id": "0000:3b:00.0"])
        #expect(manifest.findings.contains { $0.subject == "gpu0" && $0.message.contains("gpu-pci-id") })
    }

    @Test func ambiguousTextIsKept() throws {
        let manifest = try assign([["id": "26:00.0", "vendorId": "4318", "deviceId": "0x20b5"]])
        let device = try #require(manifest.otherDevices.first)
        #expect(device.passthrough.address.isEmpty && device.passthrough.rawAddress == "26:00.0")
        #expect(device.config == ["vendorId": "4318"])
        #expect(manifest.findings.filter { $0.severity == .warning }.count == 2)
    }

    @Test func everyBacking() throws {
        let manifest = try assign([
            ["virtualDev": "vmiop", "vgpu": "grid_a100-40c"],
            ["vgpu": "grid_t4-16q", "present": "TRUE"],
            ["virtualDev": "dvx", "dvx.deviceClass": "com.vendor.accelerator", "dvx.config.mode": "fast"],
            ["allowedDevices": "0x10de:0x20f1, 0x10de:0x20f2:0x10de:0x145f", "customLabel": "Training"],
            [
                "systemId": "BYPASS", "pfId": "00000:026:00.0", "id": "00000:026:01.2",
                "dvs.portgroupId": "dvportgroup-9",
                "vendorId": "0x8086", "deviceId": "0x1889",
            ],
            ["present": "FALSE", "id": "00000:027:00.0"],
            ["present": "TRUE"],
            ["class": "0x0108", "vendorId": "0x144d", "deviceId": "0xa80a", "id": "00000:028:00.0"],
        ])
        #expect(manifest.gpus.map(\.label) == (0...3).map { "pciPassthru\($0)" })
        #expect(manifest.gpus[0].vgpu.profile == "grid_a100-40c" && manifest.gpus[1].vgpu.profile == "grid_t4-16q")
        #expect(manifest.gpus[2].dvx.deviceClass == "com.vendor.accelerator")
        #expect(manifest.gpus[2].dvx.parameters == ["mode": "fast"] && manifest.gpus[2].config.isEmpty)
        #expect(manifest.gpus[3].dynamic.allowed.map(\.device) == [0x20f1, 0x20f2])
        #expect(manifest.gpus[3].dynamic.allowed[1].subsystemDevice == 0x145f)
        #expect(manifest.otherDevices.map(\.label) == ["pciPassthru4", "pciPassthru6", "pciPassthru7"])
        let function = manifest.otherDevices[0].sriov
        #expect(function.physicalFunction == "0000:1a:00.0" && function.portgroupKey == "dvportgroup-9")
        #expect(function.rawAddress == "00000:026:01.2" && function.id.vendor == 0x8086)
        // Whether a device may be left out is not the source's to say.
        #expect(!manifest.findings.contains { $0.severity == .blocked })
        #expect(manifest.findings.contains { $0.message.contains("switched off") })
        #expect(manifest.findings.contains { $0.subject == "device2" && $0.message.contains("0x0108") })
    }

    /// Settings of a device that was removed long ago.
    @Test func settingsAloneAreNoDevice() throws {
        let manifest = try assign([["pciSlotNumber": "256", "cfg.enable_uvm": "1", "msiEnabled": "TRUE"]])
        #expect(manifest.gpus.isEmpty && manifest.otherDevices.isEmpty)
        #expect(manifest.findings.map(\.severity) == [.note], "\(manifest.findings)")
        #expect(manifest.findings[0].message.contains("cfg.enable_uvm"))
    }

    @Test func audioFunctionIsNoSecondGPU() throws {
        let manifest = try assign([
            ["id": "0000:3b:00.0", "vendorId": "0x10de", "deviceId": "0x2204"],
            ["id": "0000:3b:00.1", "vendorId": "0x10de", "deviceId": "0x1aef"],
        ])
        #expect(manifest.gpus.map(\.label) == ["pciPassthru0"])
        #expect(manifest.otherDevices.map(\.label) == ["pciPassthru1"])
    }

    @Test(
        arguments: [
            (0x0300, 0x1234, 0, GPUKind.gpu), (0x0403, 0x10de, 0, .other), (0, 0x10de, 1, .gpu), (0, 0x1002, 1, .gpu),
            (0, 0x8086, 0x56c0, .gpu), (0, 0x8086, 0x1572, .unknown), (0, 0x15b3, 0x101b, .unknown),
        ] as [(UInt32, UInt32, UInt32, GPUKind)])
    func kinds(_ code: UInt32, _ vendor: UInt32, _ device: UInt32, _ expected: GPUKind) {
        var id = PciId()
        (id.vendor, id.device) = (vendor, device)
        #expect(GPUKind(classCode: code, id: id) == expected)
    }

    @Test func noVMHasThatMany() {
        let devices = (0..<300).map { ["id": "00000:\($0 % 256):00.0"] }
        #expect(failure { try assign(devices) }?.code == .invalidArgument)
    }

    @Test func keysOfTheWholeMachineAreNoDevice() {
        #expect(Manifest.passthroughKey("pciPassthru.use64bitMMIO") == nil)
        #expect(Manifest.passthroughKey("PCIPASSTHRU12.cfg.x")?.index == 12)
        #expect(Manifest.passthroughKey("pciPassthru99999.x") == nil)
        #expect(Manifest.passthroughKey("pciPassthru0") == nil)
    }
}
