import FlotillaProtocol
import Passthrough
import SwiftProtobuf
import Testing

@Suite struct MatchTests {
    let a100: (UInt32, UInt32) = (0x10de, 0x20f1)

    @Test func handsOverWholeSlots() {
        let match = matchDevices([passthrough("gpu0", 0x10de, 0x2204)], on: gpuHost())
        #expect(match.isComplete && match.findings.isEmpty)
        #expect(match.devices.map { $0.map(\.address) } == [["0000:86:00.0", "0000:86:00.1"]])
    }

    @Test func aGpuAndItsAudioAreOneDevice() {
        let wanted = [
            passthrough("gpu0", 0x10de, 0x2204, address: "0000:1a:00.0"),
            passthrough("device0", 0x10de, 0x1aef, address: "0000:1a:00.1", classCode: 0x0403),
        ]
        let match = matchDevices(wanted, on: gpuHost())
        #expect(match.isComplete && match.devices.count == 1 && match.entries.count == 2)
        #expect(match.entries[1].functions.count == 2)

        let apart = matchDevices(
            [wanted[0], passthrough("device0", 0x8086, 0x1572, address: "0000:1a:00.1")], on: gpuHost())
        #expect(apart.findings.map(\.subject) == ["gpu0", "device0"])
        #expect(apart.findings[0].message.contains("in one slot"))
    }

    /// With the GPU mapped its audio asks for no card of its own.
    @Test(arguments: ["10de:20f1", "A40-4Q"]) func audioOfAMappedGpu(_ target: String) throws {
        let manifest = Manifest.with {
            $0.gpus = [passthrough("gpu0", 0x10de, 0x2204, address: "0000:1a:00.0")]
            $0.otherDevices = [
                passthrough("device0", 0x10de, 0x1aef, address: "0000:1a:00.1", classCode: 0x0403),
                passthrough("device1", 0x8086, 0x1572, address: "0000:1b:00.0", classCode: 0x0200),
            ]
        }
        let mapping = try GpuMapping.with {
            $0.source = try #require(GpuKind(parsing: "10de:2204"))
            $0.target = try #require(GpuKind(parsing: target))
        }
        #expect(wantedDevices(manifest, []).map(\.id) == ["gpu0", "device0", "device1"])
        #expect(wantedDevices(manifest, [mapping]).map(\.id) == ["gpu0", "device1"])
        var options = DeployOptions()
        options.gpuMappings = [mapping]
        let match = deviceMatch(manifest: manifest, options: options, host: gpuHost())
        #expect(!match.devices.joined().contains { $0.id.device == 0x2204 || $0.id.device == 0x1aef })
        for findings in [
            preflight(manifest: manifest, options: options, pool: "main", host: gpuHost()),
            hostlessFindings(manifest: manifest, options: options),
        ] {
            let audio = findings.filter { $0.subject == "device0" }
            #expect(audio.map(\.severity) == [.note] && audio[0].message.contains("gpu0, beside which it is, becomes"))
            #expect(audio[0].message.contains(target))
        }
    }

    /// Its audio alone would take the GPU along, which nobody asked for.
    @Test func aPartTakesNoGPUAlong() throws {
        let audio = passthrough("device0", 0x10de, 0x1aef, address: "0000:1a:00.1", classCode: 0x0403)
        let match = matchDevices([audio], on: gpuHost())
        #expect(match.devices.isEmpty)
        #expect(match.findings.map(\.subject) == ["device0"])
        #expect(match.findings[0].message.contains("is a part of 0000:86:00.0 (10de:2204"), "\(match.findings)")
        // Nor where the GPU goes to the same VM from elsewhere.
        let gpu = passthrough("gpu0", 0x10de, 0x2204, address: "0000:3c:00.0")
        #expect(matchDevices([audio, gpu], on: gpuHost()).findings.map(\.subject) == ["device0"])
    }

    @Test func aDeviceWithAChoiceMakesRoom() {
        let host = gpuHost { $0.pciFunctions.removeAll { $0.address == "0000:5e:00.0" } }
        let wanted = [dynamic("gpu0", [a100, (0x10de, 0x2204)]), passthrough("gpu1", 0x10de, 0x20f1)]
        let match = matchDevices(wanted, on: host)
        #expect(match.isComplete)
        #expect(match.entries.map { $0.functions[0].address } == ["0000:86:00.0", "0000:3b:00.0"])
    }

    @Test func prefersItsOwnThenTheSameBoard() {
        let host = gpuHost {
            $0.pciFunctions[2].id.subsystemVendor = 0x10de
            $0.pciFunctions[2].id.subsystemDevice = 0x1533
        }
        var wanted = passthrough("gpu0", 0x10de, 0x20f1)
        #expect(matchDevices([wanted], on: host).devices[0][0].address == "0000:3b:00.0")
        wanted.passthrough.id.subsystemVendor = 0x10de
        wanted.passthrough.id.subsystemDevice = 0x1533
        #expect(matchDevices([wanted], on: host).devices[0][0].address == "0000:5e:00.0")
        var used = host
        used.pciFunctions[1].inUseBy = inUseBy(domain: "web")
        #expect(matchDevices([wanted], on: used, for: "web").devices[0][0].address == "0000:3b:00.0")
    }

    @Test func devicesOfOneVMMayShareAGroup() {
        let host = gpuHost { $0.pciFunctions[2].iommuGroup = 42 }
        let both = [passthrough("gpu0", 0x10de, 0x20f1), passthrough("gpu1", 0x10de, 0x20f1)]
        #expect(matchDevices(both, on: host).isComplete)
        // One alone would leave the other bound to its driver.
        let one = matchDevices([both[0]], on: host)
        #expect(
            one.findings.first?.message.contains("shares IOMMU group 42 with 0000:5e:00.0 (10de:20f1, nvidia)") == true)
    }

    /// A group goes to one VM, also while nothing drives what is in it.
    @Test(arguments: ["domain other", "VM other, which goes first", "domain other (migration m-1)"])
    func aGroupOfTwoVMs(_ user: String) {
        let host = gpuHost {
            for index in 1...2 { ($0.pciFunctions[index].iommuGroup, $0.pciFunctions[index].driver) = (42, "") }
            $0.pciFunctions[2].inUseBy = user
        }
        let gpu = passthrough("gpu0", 0x10de, 0x20f1)
        let refused = matchDevices([gpu], on: host).findings
        #expect(refused.contains { $0.message.contains("shares IOMMU group 42 with 0000:5e:00.0") }, "\(refused)")
        #expect(matchDevices([gpu], on: host, for: "other", migration: "m-1").isComplete == user.hasPrefix("domain"))
        var free = host
        free.pciFunctions[2].inUseBy = ""
        #expect(matchDevices([gpu], on: free).isComplete)
    }

    @Test func aGroupOfItsOwnComesFirst() {
        // The first A100 shares a group with the A40, which the VM could also get but does not.
        let host = gpuHost {
            $0.pciFunctions[5].iommuGroup = 42
            $0.pciFunctions[6].driver = ""
        }
        let wanted = [passthrough("gpu0", 0x10de, 0x20f1), dynamic("gpu1", [(0x10de, 0x2204), (0x10de, 0x2235)])]
        let match = matchDevices(wanted, on: host)
        #expect(match.entries.map { $0.functions.first?.address } == ["0000:5e:00.0", "0000:86:00.0"])
    }

    /// A virtual function with the id of its physical one is a part of what is wanted.
    @Test func aPartIsNotTheWhole() throws {
        try withRecordedMachine { sysfs in
            var host = gpuHost { $0.pciFunctions = (try? pciInventory(sysfs: sysfs)) ?? [] }
            addDetail(&host.pciFunctions, sysfs: sysfs)
            let parts = host.pciFunctions.indices.filter { !host.pciFunctions[$0].physicalFunction.isEmpty }
            #expect(parts.map { host.pciFunctions[$0].address } == ["0000:03:00.1", "0000:03:00.2"])
            let nvme = passthrough("gpu0", 0x1b36, 0x0010, classCode: 0x0108)
            #expect(matchDevices([nvme], on: host).devices.map { $0.map(\.address) } == [["0000:09:00.0"]])
            host.pciFunctions[parts[1]].id.device = 0x0011
            let virtual = passthrough("gpu0", 0x1b36, 0x0011, classCode: 0x0108)
            #expect(matchDevices([virtual], on: host).devices.map { $0.map(\.address) } == [["0000:03:00.2"]])
            host.pciFunctions.removeAll { $0.address == "0000:09:00.0" }
            let why = matchDevices([nvme], on: host).findings.map(\.message).joined()
            #expect(why.contains("in use by its 2 virtual functions"), "\(why)")
            #expect(!host.wholeFunctions.contains { $0.address == "0000:03:00.1" })
        }
    }

    struct Reason: Sendable, CustomTestStringConvertible {
        var testDescription: String
        var wanted: AssignedDevice
        var host: HostProfile
        var message: [String]
        var remedy: String
    }

    static let reasons: [Reason] = {
        let a100 = passthrough("gpu0", 0x10de, 0x20f1)
        func only(_ change: @escaping (inout PciFunction) -> Void) -> HostProfile {
            gpuHost {
                $0.pciFunctions.removeAll { $0.address == "0000:5e:00.0" }
                change(&$0.pciFunctions[1])
            }
        }
        return [
            Reason(
                testDescription: "IOMMU off, Intel", wanted: a100, host: gpuHost { $0.iommuEnabled = false },
                message: ["IOMMU of host kvm1 is off"], remedy: "`intel_iommu=on iommu=pt`"),
            Reason(
                testDescription: "IOMMU off, AMD", wanted: a100,
                host: gpuHost {
                    $0.iommuEnabled = false
                    $0.pciFunctions[0].id.vendor = 0x1022
                }, message: ["IOMMU of host kvm1 is off"], remedy: "amd_iommu=off"),
            Reason(
                testDescription: "no vfio-pci", wanted: a100, host: gpuHost { $0.vfioAvailable = false },
                message: ["no vfio-pci driver"], remedy: "modprobe vfio-pci"),
            Reason(
                testDescription: "not present", wanted: passthrough("gpu0", 0x10de, 0x2330), host: gpuHost(),
                message: ["10de:2330", "no such device", "0000:3b:00.0 (10de:20f1, nvidia)", "0000:af:00.0"],
                remedy: "--gpu drop"),
            Reason(
                testDescription: "no NIC present", wanted: passthrough("device0", 0x15b3, 0x1017, classCode: 0x0207),
                host: gpuHost(), message: ["it has no device of its class"], remedy: "choose a host"),
            Reason(
                testDescription: "shared group", wanted: passthrough("gpu0", 0x10de, 0x2235), host: gpuHost(),
                message: ["0000:af:00.0 shares IOMMU group 60 with 0000:b0:00.0 (8086:1572, i40e)"], remedy: "slot"),
            Reason(
                testDescription: "boot VGA", wanted: a100, host: only { $0.bootVga = true },
                message: ["boot VGA"], remedy: "primary display"),
            Reason(
                testDescription: "bridge", wanted: a100, host: only { $0.bridge = true }, message: ["is a bridge"],
                remedy: "another device"),
            Reason(
                testDescription: "in use", wanted: a100, host: only { $0.inUseBy = inUseBy(domain: "render") },
                message: ["in use by domain render"], remedy: "free it"),
            Reason(
                testDescription: "no group", wanted: a100, host: only { $0.iommuGroup = -1 },
                message: ["in no IOMMU group"], remedy: "firmware"),
            Reason(
                testDescription: "group held by another domain", wanted: passthrough("gpu0", 0x10de, 0x2235),
                host: gpuHost {
                    $0.pciFunctions[6].driver = "vfio-pci"
                    $0.pciFunctions[6].inUseBy = inUseBy(domain: "router")
                }, message: ["0000:b0:00.0", "in use by domain router"], remedy: "free it"),
            Reason(
                testDescription: "vGPU",
                wanted: .with {
                    $0.id = "gpu0"
                    $0.vgpu.profile = "grid_a100-40c"
                }, host: gpuHost(), message: ["no room for a vGPU A100-40C"], remedy: "--gpu-map"),
            Reason(
                testDescription: "DVX",
                wanted: .with {
                    $0.id = "gpu0"
                    $0.dvx.deviceClass = "com.example.accel"
                }, host: gpuHost(), message: ["com.example.accel"], remedy: "`--gpu drop`"),
            Reason(
                testDescription: "SR-IOV",
                wanted: .with {
                    $0.id = "gpu0"
                    $0.sriov = .with { $0.id = .with { ($0.vendor, $0.device) = (0x8086, 0x154c) } }
                }, host: gpuHost(), message: ["virtual function (8086:154c)"], remedy: "`--gpu drop`"),
            Reason(
                testDescription: "unknown ids", wanted: passthrough("gpu0", 0, 0), host: gpuHost(),
                message: ["does not say which"], remedy: "again"),
            Reason(
                testDescription: "no backing", wanted: .with { $0.id = "gpu0" }, host: gpuHost(),
                message: ["nothing of what backs it"], remedy: "export"),
        ]
    }()

    @Test(arguments: reasons) func saysWhyNot(_ reason: Reason) throws {
        let match = matchDevices([reason.wanted], on: reason.host)
        #expect(!match.isComplete && match.devices.isEmpty && match.findings.count == 1)
        let finding = try #require(match.findings.first)
        #expect(finding.severity == .blocked && finding.subject == reason.wanted.id)
        for part in reason.message { #expect(finding.message.contains(part), "\(finding.message)") }
        #expect(finding.remedy.contains(reason.remedy), "\(finding.remedy)")
    }

    @Test func saysWhenThereAreTooFew() throws {
        let wanted = (0..<3).map { passthrough("gpu\($0)", 0x10de, 0x20f1) }
        let match = matchDevices(wanted, on: gpuHost())
        #expect(match.devices.count == 2 && match.findings.count == 1)
        let finding = try #require(match.findings.first)
        #expect(finding.subject == "gpu2")
        #expect(finding.message.contains("needs 3 such devices, host kvm1 has 2"), "\(finding.message)")
    }

    @Test func theRecordedMachine() throws {
        try withRecordedMachine { sysfs in
            let host = HostProfile.with {
                $0.name = "q35"
                $0.iommuEnabled = iommuEnabled(sysfs: sysfs)
                $0.vfioAvailable = vfioAvailable(sysfs: sysfs)
                $0.pciFunctions = (try? pciInventory(sysfs: sysfs)) ?? []
            }
            func reason(_ vendor: UInt32, _ device: UInt32) -> String {
                matchDevices([passthrough("gpu0", vendor, device, classCode: 0)], on: host).findings.map(\.message)
                    .joined(separator: "\n")
            }
            #expect(reason(0x1234, 0x1111) == "")
            #expect(reason(0x1002, 0x5046).contains("boot VGA"))
            #expect(reason(0x8086, 0x100e) == "")  // Its group: a driverless bridge and a driverless device.
            #expect(reason(0x1b36, 0x0005).contains("0000:05:01.0 (8086:100e, e1000)"))
            #expect(reason(0x8086, 0x2918).contains("bridge"))
            // The bound port beside it does not block.
            #expect(matchDevices([passthrough("nic", 0x1af4, 0x1041)], on: host).isComplete)
        }
    }
}
