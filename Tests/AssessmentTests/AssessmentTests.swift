import Assessment
import FlotillaProtocol
import MigrationModel
import Passthrough
import SwiftProtobuf
import Testing

@Suite struct AssessmentTests {
    static func manifest(_ change: (inout Manifest) -> Void = { _ in }) -> Manifest {
        var manifest = Manifest()
        manifest.schemaVersion = 1
        manifest.vm.name = "web"
        manifest.vm.cpu.count = 2
        manifest.vm.memory.bytes = 1 << 30
        manifest.vm.powerState = .poweredOff
        var disk = Disk()
        disk.id = "disk0"
        disk.capacityBytes = 20 << 30
        disk.mode = "persistent"
        manifest.disks = [disk]
        var nic = NIC()
        nic.id = "nic0"
        nic.network = "VM Network"
        manifest.nics = [nic]
        change(&manifest)
        return manifest
    }

    static func host(free: UInt64 = 1 << 40, gpu: Bool = true) -> HostProfile {
        var host = HostProfile()
        host.name = "kvm1"
        host.cpus = 16
        host.memoryBytes = 64 << 30
        host.bridges = ["br0"]
        host.iommuEnabled = true
        host.vfioAvailable = true
        var pool = Pool()
        (pool.name, pool.path, pool.freeBytes, pool.writable) = ("images", "/images", free, true)
        host.pools = [pool]
        if gpu {
            var function = PciFunction()
            function.address = "0000:3b:00.0"
            function.id.vendor = 0x10de
            function.id.device = 0x20b5
            function.classCode = 0x0302
            function.iommuGroup = 7
            function.driver = "vfio-pci"
            host.pciFunctions = [function]
        }
        return host
    }

    static func gpu(_ backing: AssignedDevice.OneOf_Backing) -> AssignedDevice {
        var device = AssignedDevice()
        device.id = "gpu0"
        device.backing = backing
        return device
    }

    static var mapped: DeployOptions {
        var options = DeployOptions()
        var mapping = NetworkMapping()
        (mapping.source, mapping.bridge) = ("VM Network", "br0")
        options.networks = [mapping]
        return options
    }

    static func assess(
        _ manifest: Manifest, hosts: [HostProfile] = [], options: DeployOptions = mapped
    ) throws -> Assessment.VM {
        var assessment = Assessment(hosts: hosts, options: options, pool: nil, format: "raw")
        assessment.add(manifest, source: "manifest:web.json")
        return try #require(assessment.vms.first)
    }

    @Test func nothingInTheWay() throws {
        let vm = try Self.assess(Self.manifest(), hosts: [Self.host()])
        #expect(vm.verdict == .ready)
        #expect(vm.reasons.isEmpty)
        #expect(vm.hosts == ["kvm1"])
    }

    /// Every reason that has to be told, by the words it is told with.
    @Test(arguments: [
        ("raw device mapping", Assessment.Verdict.blocked), ("is shared", .blocked), ("independent", .warning),
        ("encrypted", .blocked), ("TPM", .warning), ("snapshots", .warning), ("Device Virtualization", .blocked),
        ("running", .blocked), ("suspended", .blocked),
    ])
    func blockers(_ word: String, _ verdict: Assessment.Verdict) throws {
        let manifest = Self.manifest {
            switch word {
            case "raw device mapping": $0.disks[0].rawDeviceMapping = "physicalMode"
            case "is shared": $0.disks[0].shared = true
            case "independent": $0.disks[0].mode = "independent_persistent"
            case "encrypted": $0.vm.encrypted = true
            case "TPM": $0.vm.tpm = true
            case "snapshots": $0.vm.snapshots = [Snapshot()]
            case "running": $0.vm.powerState = .poweredOn
            case "suspended": $0.vm.powerState = .suspended
            default: $0.gpus = [Self.gpu(.dvx(.with { $0.deviceClass = "com.acme.fpga" }))]
            }
        }
        for hosts in [[], [Self.host()]] {
            let vm = try Self.assess(manifest, hosts: hosts)
            #expect(vm.verdict == verdict)
            let reasons = vm.reasons.filter { $0.message.contains(word) }
            #expect(reasons.count == 1, "told once: \(vm.reasons)")
            #expect(reasons.first?.severity == verdict)
            #expect(reasons.first?.remedy.isEmpty == false)
        }
    }

    /// Whether a vGPU can be had is a question of the host.
    @Test func vgpuOfNoHost() throws {
        let manifest = Self.manifest { $0.gpus = [Self.gpu(.vgpu(.with { $0.profile = "grid_a100-40c" }))] }
        #expect(try Self.assess(manifest).verdict == .warning)
        let vm = try Self.assess(manifest, hosts: [Self.host()])
        #expect(vm.verdict == .blocked)
        #expect(vm.reasons.contains { $0.severity == .blocked && $0.message.lowercased().contains("a100-40c") })
        #expect(vm.hosts.isEmpty)
    }

    /// The remedy that is told is one.
    @Test func aDVXDeviceCanBeLeftOut() throws {
        let manifest = Self.manifest { $0.gpus = [Self.gpu(.dvx(.with { $0.deviceClass = "com.acme.fpga" }))] }
        var dropping = Self.mapped
        dropping.gpu = .gpuDrop
        for hosts in [[], [Self.host()]] {
            #expect(try Self.assess(manifest, hosts: hosts).verdict == .blocked)
            #expect(try Self.assess(manifest, hosts: hosts, options: dropping).verdict == .warning)
        }
    }

    @Test func networkWithoutMapping() throws {
        for hosts in [[], [Self.host()]] {
            let vm = try Self.assess(Self.manifest(), hosts: hosts, options: DeployOptions())
            #expect(vm.verdict == .blocked)
            #expect(vm.reasons.contains { $0.message.contains("\"VM Network\" is mapped to nothing") })
        }
    }

    @Test func poolTooSmall() throws {
        let vm = try Self.assess(Self.manifest(), hosts: [Self.host(free: 1 << 30)])
        #expect(vm.verdict == .blocked)
        #expect(vm.reasons.contains { $0.message.contains("pool images of host kvm1 has 1 GiB free") })
        #expect(vm.hosts.isEmpty)
    }

    @Test func gpuFitsWhereItIs() throws {
        let id = PciId.with {
            $0.vendor = 0x10de
            $0.device = 0x20b5
        }
        let manifest = Self.manifest { $0.gpus = [Self.gpu(.passthrough(.with { $0.id = id }))] }
        var without = Self.host(gpu: false)
        without.name = "kvm2"
        let vm = try Self.assess(manifest, hosts: [without, Self.host()])
        #expect(vm.verdict == .ready)
        #expect(vm.hosts == ["kvm1"])
        #expect(vm.devices.first?.fits.map(\.host) == ["kvm1"])
        #expect(vm.devices.first?.fits.first?.functions == ["0000:3b:00.0"])

        let nowhere = try Self.assess(manifest, hosts: [without])
        #expect(nowhere.verdict == .blocked)
        #expect(nowhere.reasons.contains { $0.message.contains("kvm2 has no such device") })
        #expect(try Self.assess(manifest).verdict == .warning, "no host was looked at")
    }

    @Test func aCapturesOwnWordsAreNotRepeated() throws {
        let manifest = Self.manifest {
            $0.disks[0].shared = true
            $0.findings = [.blocked("disk0", "scsi0:1 is shared with other VMs (multi-writer)", remedy: "stop it")]
        }
        #expect(try Self.assess(manifest).reasons.count == 1)
    }

    @Test func preflightBlocksWhatTheFieldsSay() {
        let manifest = Self.manifest { $0.vm.encrypted = true }
        let findings = preflight(
            manifest: manifest, options: Self.mapped, pool: "images", diskFormat: "raw", host: Self.host())
        #expect(findings.contains { $0.severity == .blocked && $0.message.contains("encrypted") })
    }

    /// What each alone could have: a name, a UUID, room.
    @Test(arguments: ["becomes the domain", "same BIOS UUID", "take the room"])
    func whatOnlyOneOfThemCanHave(_ words: String) throws {
        let free: UInt64 = words == "take the room" ? 30 << 30 : 1 << 40
        var assessment = Assessment(hosts: [Self.host(free: free)], options: Self.mapped, pool: nil, format: "raw")
        for number in 1...2 {
            assessment.add(
                Self.manifest {
                    $0.vm.name = words == "becomes the domain" ? (number == 1 ? "my vm" : "my-vm") : "vm\(number)"
                    let uuid = words == "same BIOS UUID" ? 1 : number
                    $0.vm.biosUuid = "564d0000-0000-0000-0000-00000000000\(uuid)"
                }, source: "manifest:\(number).json")
        }
        #expect(assessment.vms.map(\.verdict) == [.ready, .warning])
        #expect(assessment.vms[1].reasons.map { $0.message.contains(words) } == [true], "\(assessment.vms[1].reasons)")
    }

    /// One GPU, two VMs that want it: each alone could have it. Nor do two of one group serve two VMs, whatever drives them.
    @Test(arguments: [nil, "", "vfio-pci"]) func togetherTheyWantMoreThanThereIs(_ second: String?) throws {
        var host = Self.host()
        if let second {
            host.pciFunctions[0].driver = second
            host.pciFunctions.append(host.pciFunctions[0])
            host.pciFunctions[1].address = "0000:5e:00.0"
        }
        var id = PciId()
        (id.vendor, id.device) = (0x10de, 0x20b5)
        var whole = PassthroughBacking()
        whole.id = id
        var assessment = Assessment(hosts: [host], options: Self.mapped, pool: nil, format: "raw")
        for name in ["first", "second"] {
            assessment.add(
                Self.manifest {
                    $0.vm.name = name
                    $0.gpus = [Self.gpu(.passthrough(whole))]
                }, source: "manifest:\(name).json")
        }
        #expect(assessment.vms.map(\.hosts) == [["kvm1"], ["kvm1"]])
        let short = assessment.vms.map { $0.reasons.filter { $0.subject == "gpus" }.map(\.message) }
        #expect(short == [[], ["the VMs before this one take all that the hosts have of 10de:20b5"]])
        #expect(assessment.demand.map { [$0.wanted, $0.free] } == [[2, 1]])
    }

    /// What no VM can have is not free.
    @Test(arguments: ["no IOMMU", "no vfio-pci", "no group", "unusable"]) func notFree(_ why: String) throws {
        var host = Self.host()
        switch why {
        case "no IOMMU": host.iommuEnabled = false
        case "no vfio-pci": host.vfioAvailable = false
        case "no group": host.pciFunctions[0].iommuGroup = -1
        default: host.pciFunctions[0].unusable = "the firmware gave its BAR 0 (16 GiB) no address"
        }
        let whole = PassthroughBacking.with { $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) } }
        var assessment = Assessment(hosts: [host], options: Self.mapped, pool: nil, format: "raw")
        assessment.add(Self.manifest { $0.gpus = [Self.gpu(.passthrough(whole))] }, source: "manifest:a.json")
        #expect(assessment.demand.map { [$0.wanted, $0.free] } == [[1, 0]])
    }
}

@Suite struct VgpuAssessmentTests {
    /// An L40S holds two of 24 GB, whatever each of its 32 virtual functions offers.
    @Test func theWholeSetIsJudged() throws {
        var host = AssessmentTests.host()
        host.pciFunctions = (0...32).map { index in
            .with {
                $0.address = index == 0 ? "0000:3b:00.0" : "0000:3b:0\((index + 7) / 8).\(index % 8)"
                ($0.id.vendor, $0.id.device, $0.classCode, $0.iommuGroup) = (0x10de, 0x26b9, 0x0302, Int32(index))
                guard index > 0 else { return }
                ($0.physicalFunction, $0.vgpuPath) = ("0000:3b:00.0", "vendor-vfio")
                $0.vgpuTypes = ["48Q", "24Q"].map { size in
                    .with { ($0.id, $0.name, $0.available) = (size, "NVIDIA L40S-\(size)", 1) }
                }
            }
        }
        var assessment = Assessment(hosts: [host], options: AssessmentTests.mapped, pool: nil, format: "raw")
        for name in ["first", "second", "third"] {
            assessment.add(
                AssessmentTests.manifest {
                    $0.vm.name = name
                    $0.gpus = [AssessmentTests.gpu(.vgpu(.with { $0.profile = "grid_l40s-24q" }))]
                }, source: "manifest:\(name).json")
        }
        #expect(assessment.vms.map(\.verdict) == [.ready, .ready, .warning])
        #expect(assessment.demand.map { [$0.wanted, $0.free] } == [[3, 2]])
        // Its virtual functions have its id; they are no GPUs.
        let whole = PassthroughBacking.with { $0.id = .with { ($0.vendor, $0.device) = (0x10de, 0x26b9) } }
        assessment.add(
            AssessmentTests.manifest { $0.gpus = [AssessmentTests.gpu(.passthrough(whole))] }, source: "manifest:w.json"
        )
        #expect(assessment.demand.map { [$0.wanted, $0.free] } == [[3, 2], [1, 1]])
    }
}

@Suite struct PageTests {
    @Test func hostileTextStaysText() throws {
        let evil = "</script><img src=x onerror=alert(1)>&\"'"
        let manifest = AssessmentTests.manifest {
            $0.vm.name = evil
            $0.nics[0].network = evil
            $0.gpus = [AssessmentTests.gpu(.vgpu(.with { $0.profile = evil }))]
        }
        var assessment = Assessment(hosts: [], options: DeployOptions(), pool: nil, format: "qcow2")
        assessment.add(manifest, source: evil)
        let html = try Page(assessment, title: evil, date: evil).html()
        #expect(!html.contains("<img"))
        #expect(html.count(of: "</script>") == 2)
        #expect(!html.contains("src=\"") && !html.contains("href="), "loads nothing")
    }

    @Test func fiveThousandVMsStayQuickAndSmall() throws {
        var assessment = Assessment(
            hosts: [AssessmentTests.host()], options: AssessmentTests.mapped, pool: nil, format: "qcow2")
        for number in 0..<5000 {
            assessment.add(
                AssessmentTests.manifest {
                    $0.vm.name = "vm-\(number)"
                    $0.vm.tpm = number % 3 == 0
                    $0.disks[0].shared = number % 7 == 0
                }, source: "manifest:vm-\(number).json")
        }
        let html = try Page(assessment, title: "Assessment", date: "today").html()
        #expect(assessment.summary.ready + assessment.summary.warning + assessment.summary.blocked == 5000)
        #expect(html.utf8.count < 3_000_000)
    }
}

extension String {
    fileprivate func count(of text: String) -> Int {
        split(separator: text, omittingEmptySubsequences: false).count - 1
    }
}
