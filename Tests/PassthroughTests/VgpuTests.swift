import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

@Suite struct VgpuTests {
    let web = GPUOwner(domain: "web", migration: "m-1", fence: 1)
    let render = GPUOwner(domain: "render", migration: "m-2", fence: 1)

    @Test(arguments: ["grid_a100-40c", "nvidia_a100-40c", "GRID A100-40C", "NVIDIA A100-40C", "A100-40c"])
    func spellingsOfOneProfile(_ name: String) {
        #expect(VgpuProfile(name) == VgpuProfile("a100-40c") && VgpuProfile(name).gpuInstance == nil)
    }

    @Test func spellingsWithMoreWords() {
        let name = "NVIDIA RTX Pro 6000 Blackwell DC-1-24Q"
        #expect(VgpuProfile(name) == VgpuProfile("nvidia_rtx_pro_6000_blackwell_dc-1-24q"))
        #expect(VgpuProfile("i915-GVTg_V5_4").description == "I915-GVTG_V5_4")
    }

    @Test(arguments: [
        ("A100-1-5C", "1g.5gb"), ("grid_a100-7-40c", "7g.40gb"), ("H100-1-10CME", "1g.10gb+me"),
        ("A100D-2-20C", "2g.20gb"),
    ])
    func profilesOfInstances(_ name: String, _ instance: String) {
        #expect(VgpuProfile(name).gpuInstance == instance)
    }

    @Test(arguments: [("A40-4Q", "RTX Virtual Workstation"), ("t4-2b4", "Virtual PC"), ("A100-1-5C", "AI Enterprise")])
    func licenses(_ profile: String, _ product: String) throws {
        let linux = try #require(VgpuLicense(VgpuProfile(profile), windows: false))
        #expect(linux.product.contains(product))
        #expect(
            linux.files.map(\.path) == [
                "/etc/nvidia/gridd.conf", "/etc/nvidia/ClientConfigToken/client_configuration_token.tok",
            ])
        #expect(linux.files.map(\.content) == ["FeatureType=1\n", nil] && linux.files.map(\.mode) == ["0644", "0744"])
        let windows = try #require(VgpuLicense(VgpuProfile(profile), windows: true))
        #expect(windows.files.map(\.content) == [nil])
    }

    /// What the operator reads says what to write where, with which mode, and what reads it then.
    @Test func whatTheOperatorHasToDo() {
        let device = AssignedDevice.with {
            ($0.id, $0.vgpu.profile) = ("gpu0", "grid_a40-4q")
            $0.config = ["cfg.enable_uvm": "1", "cfg.gpu-pci-id": "0000:3b:00.0", "cfg.disable_vnc": "1"]
        }
        let finding = vgpuFindings([device], windows: false).first
        #expect(finding?.message.hasPrefix("gpu0 becomes a vGPU A40-4Q, which draws a license of NVIDIA RTX") == true)
        #expect(finding?.message.hasSuffix("; not carried: cfg.disable_vnc") == true)
        #expect(
            finding?.remedy
                == "in the source VM before it moves, or in the guest: write FeatureType=1 to /etc/nvidia/gridd.conf "
                + "(mode 0644), copy the site's client configuration token to "
                + "/etc/nvidia/ClientConfigToken/client_configuration_token.tok (mode 0744); then systemctl restart "
                + "nvidia-gridd")
        let windows = vgpuFindings([device], windows: true).first
        #expect(
            windows?.remedy.contains(
                #"to C:\Program Files\NVIDIA Corporation\vGPU Licensing\ClientConfigToken\client_configuration_token.tok"#
                    + ", with no change to the registry; then restart the service NVDisplay.ContainerLocalSystem")
                == true)
        // Not NVIDIA's: nothing to license.
        let other = AssignedDevice.with { ($0.id, $0.vgpu.profile) = ("gpu0", "i915-GVTg_V5_4") }
        #expect(vgpuFindings([other], windows: false).first?.remedy == "")
        #expect(vgpuLicenseFiles([other], windows: false).isEmpty)
        #expect(vgpuLicenseFiles([device, device], windows: false).count == 2)
    }

    @Test func parametersThatMeanTheSame() {
        let config = [
            "cfg.enable_uvm": "1", "cfg.gpu-pci-id": "0000:3b:00.0", "cfg.frame_rate_limiter": "7\n", "msi": "1",
        ]
        #expect(vgpuParameters(of: config) == ["enable_uvm=1"])
    }

    /// Both forms of the list; the second virtual function goes to the second owner, the third finds no room.
    @Test(arguments: [
        ["NVIDIA L40S-24Q 1150", "NVIDIA L40S-12Q 1149"], ["1150 : NVIDIA L40S-24Q", "1149 : NVIDIA L40S-12Q"],
    ])
    func vendorPath(_ types: [String]) throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["ID    : vGPU Name"] + types)
        let gpu = try #require(PciAddress("0000:3b:00.0"))
        let host = machine.host()
        #expect(host.places().isEmpty)
        let first = try host.create(
            VgpuProfile("grid_l40s-24q"), for: web, device: "gpu0", on: gpu, parameters: ["enable_uvm=1"])
        #expect(machine.calls == ["sriov-manage -e 0000:3b:00.0"])
        #expect(first.function == "0000:3b:00.1" && first.typeID == "1150" && first.uuid == nil)
        #expect(machine.sysfs.text("bus/pci/devices/0000:3b:00.1/nvidia/current_vgpu_type") == "1150")
        #expect(machine.sysfs.text("bus/pci/devices/0000:3b:00.1/nvidia/vgpu_params") == "enable_uvm=1")
        // The same again is the same.
        #expect(try host.create(VgpuProfile("NVIDIA L40S-24Q"), for: web, device: "gpu0").function == first.function)
        let second = try host.create(VgpuProfile("L40S-24Q"), for: render, device: "gpu0")
        #expect(second.function == "0000:3b:00.2")
        let full = failure {
            try host.create(
                VgpuProfile("L40S-24Q"), for: GPUOwner(domain: "c", migration: "m-3", fence: 1), device: "gpu0")
        }
        #expect(full?.code == .resourceExhausted && full?.message.contains("domain web (migration m-1)") == true)
        #expect(try machine.ledger.reservations().map(\.resource.key) == ["pci:0000:3b:00.1", "pci:0000:3b:00.2"])

        try host.destroy(of: web)
        #expect(machine.sysfs.text("bus/pci/devices/0000:3b:00.1/nvidia/current_vgpu_type") == "0")
        #expect(try machine.ledger.reservations().count == 1 && host.records().map(\.owner) == [render])
        // A later attempt has the say.
        _ = try host.create(
            VgpuProfile("L40S-24Q"), for: GPUOwner(domain: "web", migration: "m-1", fence: 3), device: "gpu0")
        let (made, function) = (try host.records(), "bus/pci/devices/0000:3b:00.1/nvidia/current_vgpu_type")
        #expect(failure { try host.destroy(of: web) }?.code == .aborted)
        #expect(try host.records() == made && machine.sysfs.text(function) == "1150")
    }

    /// Whoever asks by the domain's name is no attempt that a later one has replaced.
    @Test func aPersonDestroysWhatAnyAttemptMade() throws {
        let machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2)])
        let host = machine.host()
        for device in ["gpu0", "gpu1"] { _ = try host.create(VgpuProfile("T4-4Q"), for: web, device: device) }
        try machine.ledger.reserve([], for: GPUOwner(domain: "web", migration: "m-1", fence: 4))
        #expect(failure { try host.destroy(of: web) }?.code == .aborted)
        #expect(try host.destroy(ofDomain: "web", device: "gpu1").map(\.device) == ["gpu1"])
        #expect(try host.destroy(ofDomain: "web").map(\.device) == ["gpu0"])
        #expect(try host.records().isEmpty && machine.ledger.reservations().isEmpty)
    }

    /// The kernel would wait for the VM, and for as long nobody could do anything with vGPUs.
    @Test(arguments: [false, true]) func oneThatAVMHasIsNotDestroyed(_ isVendors: Bool) throws {
        let machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2)])
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        let proc = try machine.folder.sub("proc")
        let host = VgpuHost(
            sysfs: machine.sysfs, kernel: machine.kernel, tools: machine.tools,
            folder: "\(machine.folder.path)/state", boot: "boot-1", proc: proc)
        let made = try host.create(
            VgpuProfile(isVendors ? "A40-2Q" : "T4-4Q"), for: web, device: "gpu0",
            on: PciAddress(isVendors ? "0000:3b:00.0" : "0000:af:00.0"))
        let folder = made.uuid.map { "bus/mdev/devices/\($0)" } ?? "bus/pci/devices/\(made.function)"
        if isVendors {
            try Files.createDirectories(machine.sysfs.path("\(folder)/vfio-dev/vfio3"))
        } else {
            #expect(symlink("../../../kernel/iommu_groups/77", machine.sysfs.path("\(folder)/iommu_group")) == 0)
        }
        let file = try machine.folder.sub("proc/42/fd") + "/9"
        #expect(symlink(isVendors ? "/dev/vfio/devices/vfio3" : "/dev/vfio/77", file) == 0)
        try Files.writeAtomically(Array("qemu\n".utf8), to: "\(proc)/42/comm")
        let writes = {
            machine.sysfs.list("bus/mdev/devices")
                + [machine.sysfs.text("bus/pci/devices/0000:3b:00.1/nvidia/current_vgpu_type") ?? ""]
        }
        let before = writes()
        let refusals = [
            failure { try host.destroy(of: web) }, failure { try host.plan(destroy: host.records()) },
            failure { try host.create(VgpuProfile("T4-8Q"), for: web, device: "gpu0") },
        ]
        for refused in refusals {
            #expect(refused?.code == .failedPrecondition && refused?.hint == "stop the domain that uses it")
            #expect(refused?.message.contains("in use by process 42 (qemu)") == true, "\(refused?.message ?? "")")
        }
        #expect(try host.records() == [made] && writes() == before)
        try Files.remove("\(proc)/42")
        try host.destroy(of: web)
        #expect(try host.records().isEmpty && writes() != before)
    }

    /// A domain that is off names a GPU, which its driver has meanwhile.
    @Test func noneIsMadeOnAGPUOfAnotherDomain() throws {
        let machine = try VgpuMachine()
        for gpu in ["0000:3b:00.0", "0000:5e:00.0"] { try machine.mdevGPU(gpu, [("nvidia-222", "GRID T4-4Q", 2)]) }
        let functions = gpuHost {
            $0.pciFunctions[1].inUseBy = inUseBy(domain: "web")
            $0.pciFunctions[2].inUseBy = inUseBy(domain: "web (migration m-1)")
            $0.pciFunctions[3].inUseBy = "a vGPU of domain web"
        }.pciFunctions
        let first = try #require(PciAddress("0000:3b:00.0"))
        #expect(functionsOfOthers(functions, than: "web", migration: "m-1").isEmpty)
        #expect(functionsOfOthers(functions, than: "db", migration: "m-1") == [first])
        #expect(functionsOfOthers(functions, than: "db", migration: "").count == 2)
        let host = machine.host()
        let made = try host.create(VgpuProfile("T4-4Q"), for: render, device: "gpu0", besides: [first])
        #expect(made.function == "0000:5e:00.0")
        _ = try host.create(VgpuProfile("T4-4Q"), for: render, device: "gpu1", besides: [first])
        let full = failure { try host.create(VgpuProfile("T4-4Q"), for: render, device: "gpu2", besides: [first]) }
        #expect(full?.code == .resourceExhausted)
    }

    /// What libvirt's domains name counts for one made by hand as well; a vGPU of theirs leaves room beside it.
    @Test func whatLibvirtsDomainsNameIsNotUsedByHand() throws {
        let machine = try VgpuMachine()
        for gpu in ["0000:3b:00.0", "0000:5e:00.0"] { try machine.mdevGPU(gpu, [("nvidia-222", "GRID T4-4Q", 2)]) }
        let (first, second) = (try pci("0000:3b:00.0"), try pci("0000:5e:00.0"))
        let uuid = "6f1a9b80-0000-4000-8000-000000000001"
        let domains = [
            GPULedger.Domain(name: "db", migration: "", resources: [GPUResource(function: first)]),
            GPULedger.Domain(name: "ci", migration: "", resources: [GPUResource(mdev: uuid, partOf: [second])]),
        ]
        #expect(try functionsOfOthers(domains, than: "db", on: first).isEmpty)
        let others = try functionsOfOthers(domains, than: "render", on: nil)
        #expect(others == [first])
        let refused = failure { try functionsOfOthers(domains, than: "render", on: first) }
        #expect(refused?.code == .failedPrecondition && refused?.message.contains("in use by domain db") == true)
        let plan = try machine.host().plan(
            create: VgpuProfile("T4-4Q"), for: render, device: "gpu0", besides: others)
        #expect(plan.steps.count == 1 && machine.host().text(of: plan.steps[0]).contains("0000:5e:00.0"))
    }

    @Test func aTypeThatDidNotTakeIsNoVgpu() throws {
        let machine = try VgpuMachine { VgpuKernel(sysfs: $0, deaf: ["0000:3b:00.1", "0000:3b:00.2", "0000:3b:00.3"]) }
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        let error = failure {
            try machine.host().create(VgpuProfile("A40-2Q"), for: web, device: "gpu0", on: PciAddress("0000:3b:00.0"))
        }
        #expect(error?.message.contains("did not become a NVIDIA A40-2Q") == true, "\(error?.message ?? "")")
        #expect(try machine.host().records().isEmpty && machine.ledger.reservations().isEmpty)
    }

    @Test func mediatedDevices() throws {
        let machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-4Q", 2), ("nvidia-223", "GRID T4-8Q", 1)])
        try machine.program("mdevctl", "exit 0")
        let host = machine.host()
        let vgpu = try host.create(VgpuProfile("grid_t4-4q"), for: web, device: "gpu0")
        let uuid = try #require(vgpu.uuid)
        #expect(machine.calls == ["mdevctl define --auto --uuid \(uuid)"] && vgpu.isInMdevctl)
        _ = try host.create(VgpuProfile("grid_t4-4q"), for: web, device: "gpu1")
        #expect(
            failure { try host.create(VgpuProfile("T4-4Q"), for: render, device: "gpu0") }?.code == .resourceExhausted)
        // The card as a whole can't go to another meanwhile.
        let whole = GPUResource(function: try #require(PciAddress("0000:af:00.0")))
        #expect(failure { try machine.ledger.reserve([whole], for: render) }?.message.contains("domain web") == true)
        try host.destroy(of: web)
        #expect(machine.sysfs.list("bus/mdev/devices").isEmpty && machine.calls.last?.contains("undefine") == true)
        #expect(try machine.ledger.reservations().isEmpty)
    }

    @Test func aRebootTakesThemAndRestoreBringsThemBack() throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        let gpu = PciAddress("0000:3b:00.0")
        let made = try machine.host().create(VgpuProfile("A40-2Q"), for: web, device: "gpu0", on: gpu)
        try machine.reboot("3b")
        #expect(try machine.host().restore() == [made])
        #expect(machine.sysfs.text("bus/pci/devices/\(made.function)/nvidia/current_vgpu_type") == "558")
        #expect(try machine.host().restore().isEmpty)

        // With another version of the driver, which numbers its types anew.
        try machine.reboot("3b")
        try machine.vendorGPU("3b", types: ["NVIDIA A40-1Q 600", "NVIDIA A40-2Q 601"])
        #expect(try machine.host().restore().map(\.typeID) == ["601"])
        #expect(try machine.host().restore().isEmpty)
        try machine.host().destroy(of: web)
        #expect(machine.sysfs.text("bus/pci/devices/\(made.function)/nvidia/current_vgpu_type") == "0")
    }

    @Test func anInterruptedCreationIsTakenUp() throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        let made = try machine.host().create(
            VgpuProfile("A40-2Q"), for: web, device: "gpu0", on: PciAddress("0000:3b:00.0"))
        let path = "\(machine.folder.path)/state/vgpus.json"
        let text = String(decoding: try Files.read(path), as: UTF8.self)
        try Files.writeAtomically(Array(text.replacing("\"present\"", with: "\"creating\"").utf8), to: path)
        let again = try machine.host().create(VgpuProfile("A40-2Q"), for: web, device: "gpu0")
        #expect(again == made)
        try Files.writeAtomically(Array(text.replacing("\"present\"", with: "\"destroying\"").utf8), to: path)
        #expect(try machine.host().create(VgpuProfile("A40-2Q"), for: web, device: "gpu0") == made)
        try machine.host().destroy(of: web)
        #expect(try machine.host().records().isEmpty && machine.ledger.reservations().isEmpty)
    }
}

@Suite struct GpuMappingTests {
    static func kind(_ text: String) throws -> GpuKind { try #require(GpuKind(parsing: text)) }

    static func vgpu(_ id: String, _ profile: String) -> AssignedDevice {
        .with {
            $0.id = id
            $0.vgpu.profile = profile
        }
    }

    /// An L40S with two virtual functions that offer a profile.
    static func host() -> HostProfile {
        gpuHost { host in
            host.pciFunctions[1].framebufferMib = 80 << 10
            for n in 4...5 {
                host.pciFunctions.append(
                    function("0000:3b:00.\(n)", 0x10de, 0x20f1, group: Int32(70 + n)) {
                        $0.physicalFunction = "0000:3b:00.0"
                        $0.vgpuTypes = [.with { ($0.id, $0.name, $0.available) = ("1", "NVIDIA A100-40C", 1) }]
                    })
            }
        }
    }

    @Test func everyKindOfMapping() throws {
        let table: [GpuMapping] = try [
            ("10de:20f1", "10de:2204"), ("10de:2235", "A100-40C"), ("grid_t4-8q", "10de:20f1"),
            ("grid_a40-4q", "A100-40C"),
        ].map { pair in
            try .with { ($0.source, $0.target) = (try Self.kind(pair.0), try Self.kind(pair.1)) }
        }
        #expect(mapped(passthrough("gpu0", 0x10de, 0x20f1), by: table).dynamic.allowed.map(\.device) == [0x2204])
        #expect(mapped(passthrough("gpu0", 0x10de, 0x2235), by: table).vgpu.profile == "A100-40C")
        #expect(mapped(Self.vgpu("gpu0", "NVIDIA T4-8Q"), by: table).dynamic.allowed.map(\.device) == [0x20f1])
        #expect(mapped(Self.vgpu("gpu0", "GRID A40-4Q"), by: table).vgpu.profile == "A100-40C")
        let other = Self.vgpu("gpu0", "grid_a100-40c")
        #expect(mapped(other, by: table) == other)
        #expect(GpuKind(parsing: "10de:xyz") == nil && GpuKind(parsing: "a;b-1") == nil && GpuKind(parsing: "") == nil)
    }

    @Test func capacityIsCounted() {
        let wanted = (0..<3).map { Self.vgpu("gpu\($0)", "grid_a100-40c") }
        let match = matchDevices(wanted, on: Self.host())
        #expect(match.findings.map(\.subject) == ["gpu2"] && match.vgpus.count == 3)
        #expect(match.findings.first?.message.contains("room for 2 vGPUs A100-40C") == true)
        // What an earlier attempt of the migration made serves again.
        var host = Self.host()
        host.vgpus = [
            .with { ($0.function, $0.profile, $0.migrationID) = ("0000:3b:00.6", "NVIDIA A100-40C", "m-1") }
        ]
        #expect(matchDevices(wanted, on: host, migration: "m-1").isComplete)
        #expect(!matchDevices(wanted, on: host, migration: "m-2").isComplete)
    }

    /// Two A100 behind one switch chip: the group can go to a VM only with the NVSwitch, which nobody wants.
    @Test func anNVSwitchInTheGroupRefuses() {
        let host = gpuHost {
            $0.pciFunctions[2].iommuGroup = 42
            $0.pciFunctions.append(
                function("0000:c1:00.0", 0x10de, 0x1af1, 0x0680, driver: "nvidia-nvswitch", group: 42) {
                    $0.bridge = true
                })
        }
        let match = matchDevices([passthrough("gpu0", 0x10de, 0x20f1), passthrough("gpu1", 0x10de, 0x20f1)], on: host)
        #expect(match.devices.isEmpty && !match.isComplete)
        #expect(match.findings.contains { $0.message.contains("0000:c1:00.0 (10de:1af1, nvidia-nvswitch)") })
    }
}
