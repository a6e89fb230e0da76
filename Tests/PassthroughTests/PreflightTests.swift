import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

@Suite struct PreflightTests {
    static func manifest(_ change: (inout Manifest) -> Void = { _ in }) -> Manifest {
        var manifest = Manifest.with {
            $0.migrationID = "m-1"
            $0.vm = .with {
                $0.name = "web"
                $0.guestID = "ubuntu64Guest"
                $0.firmware = .bios
                $0.cpu.count = 4
                $0.memory.bytes = 8 << 30
            }
            $0.disks = [.with { ($0.id, $0.capacityBytes) = ("disk0", 100 << 30) }]
            $0.nics = [.with { ($0.id, $0.network, $0.model) = ("nic0", "VM Network", "vmxnet3") }]
        }
        change(&manifest)
        return manifest
    }

    static func options(_ change: (inout DeployOptions) -> Void = { _ in }) -> DeployOptions {
        var options = DeployOptions.with {
            $0.networks = [.with { ($0.source, $0.bridge) = ("VM Network", "br0") }]
            $0.gpu = .gpuRequire
        }
        change(&options)
        return options
    }

    /// A device of the host needs what such a guest does not boot from.
    @Test func noDeviceForWhatIsOlderThanPCIExpress() {
        let manifest = Self.manifest {
            ($0.vm.guestID, $0.gpus) = ("winXPProGuest", [passthrough("gpu0", 0x10de, 0x20f1)])
        }
        let found = preflight(manifest: manifest, options: Self.options(), pool: "main", host: gpuHost())
        #expect(
            found.filter { $0.severity == .blocked }.map(\.remedy) == ["migrate it without the device (--gpu drop)"])
        let dropped = preflight(
            manifest: manifest, options: Self.options { $0.gpu = .gpuDrop }, pool: "main", host: gpuHost())
        #expect(!dropped.contains { $0.severity == .blocked })
    }

    @Test(arguments: [false, true]) func whatRunsOnTheSourceIsNotStartedHere(_ starts: Bool) {
        let running = Self.manifest {
            ($0.source.kind, $0.vm.powerState) = (.vsphere, .poweredOn)
            $0.findings = [.warning("vm", "it is running: its disks are moved as a snapshot finds them", remedy: "-")]
        }
        let found = preflight(
            manifest: running, options: Self.options { $0.start = starts }, pool: "main", host: gpuHost())
        #expect(found.map(\.severity) == (starts ? [.warning, .blocked] : [.warning]))
        #expect(found[0].message.contains("as a snapshot finds them"))
        #expect(!starts || found[1].message.contains("runs on the source"))
        // A file says how it was, not how it is.
        let file = Self.manifest { ($0.source.kind, $0.vm.powerState) = (.ova, .poweredOn) }
        #expect(
            preflight(manifest: file, options: Self.options { $0.start = true }, pool: "main", host: gpuHost()).isEmpty)
    }

    @Test func aPlainVMHasNoFindings() {
        #expect(preflight(manifest: Self.manifest(), options: Self.options(), pool: "main", host: gpuHost()).isEmpty)
    }

    struct Case: Sendable, CustomTestStringConvertible {
        var testDescription: String
        var severity = Finding.Severity.blocked
        var subject: String
        var contains: String
        var manifest = PreflightTests.manifest()
        var options = PreflightTests.options()
        var host = gpuHost()
        var pool = "main"
        var format = "qcow2"
    }

    static let cases: [Case] = [
        Case(
            testDescription: "unmapped network", subject: "nic0", contains: "\"VM Network\" is mapped to nothing",
            options: options { $0.networks = [] }),
        Case(
            testDescription: "mapping without target", subject: "nic0", contains: "is mapped to nothing",
            options: options { $0.networks[0].target = nil }),
        Case(
            testDescription: "no such bridge", subject: "nic0", contains: "no bridge br9; it has br0",
            options: options { $0.networks[0].bridge = "br9" }),
        Case(
            testDescription: "no such network", subject: "nic0", contains: "no libvirt network lab; it has default",
            options: options { $0.networks[0].network = "lab" }),
        Case(
            testDescription: "SR-IOV NIC", severity: .warning, subject: "nic0", contains: "emulated NIC",
            manifest: manifest { $0.nics[0].model = "sriov" }),
        Case(
            testDescription: "no EFI", subject: "vm", contains: "no EFI firmware",
            manifest: manifest { $0.vm.firmware = .efi }, host: gpuHost { $0.efiFirmware = false }),
        Case(
            testDescription: "no Secure Boot", subject: "vm", contains: "uses Secure Boot",
            manifest: manifest { ($0.vm.firmware, $0.vm.secureBoot) = (.efi, true) },
            host: gpuHost { $0.secureBootFirmware = false }),
        Case(
            testDescription: "TPM", severity: .warning, subject: "vm", contains: "new, empty TPM",
            manifest: manifest { $0.vm.tpm = true }),
        Case(
            testDescription: "Windows", severity: .warning, subject: "vm", contains: "attached by SATA",
            manifest: manifest { $0.vm.guestID = "windows2019srv_64Guest" }),
        Case(
            testDescription: "Windows on virtio", severity: .warning, subject: "vm",
            contains: "only with virtio drivers",
            manifest: manifest { $0.vm.guestID = "windows9_64Guest" }, options: options { $0.diskBus = .virtio }),
        Case(
            testDescription: "older than PCI Express", severity: .warning, subject: "vm",
            contains: "i440fx machine, IDE disks and RTL8139 NICs",
            manifest: manifest { $0.vm.guestID = "winNetEnterpriseGuest" }),
        Case(
            testDescription: "GPU required", subject: "gpu0", contains: "no such device",
            manifest: manifest { $0.gpus = [passthrough("gpu0", 0x10de, 0x2330)] }),
        Case(
            testDescription: "other device required", subject: "device0", contains: "no such device",
            manifest: manifest { $0.otherDevices = [passthrough("device0", 0x15b3, 0x1017, classCode: 0x0200)] }),
        Case(
            testDescription: "policy not stated means required", subject: "gpu0", contains: "no such device",
            manifest: manifest { $0.gpus = [passthrough("gpu0", 0x10de, 0x2330)] },
            options: options { $0.gpu = .unspecified }),
        Case(
            testDescription: "GPU dropped", severity: .warning, subject: "gpu0", contains: "left out, as asked",
            manifest: manifest { $0.gpus = [passthrough("gpu0", 0x10de, 0x2330)] },
            options: options { $0.gpu = .gpuDrop }),
        Case(testDescription: "no pool", subject: "pool fast", contains: "no pool fast; it has main", pool: "fast"),
        Case(
            testDescription: "read-only pool", subject: "pool main", contains: "can't be used: read-only",
            host: gpuHost { ($0.pools[0].writable, $0.pools[0].problem) = (false, "read-only") }),
        Case(
            testDescription: "full pool, raw", subject: "pool main", contains: "need about 100 GiB",
            host: gpuHost { $0.pools[0].freeBytes = 99 << 30 }, format: "raw"),
        Case(
            testDescription: "full pool, qcow2 of a stream", subject: "pool main", contains: "need about 6 GiB",
            manifest: manifest {
                $0.disks[0].source.variant = "streamOptimized"
                $0.disks[0].source.length = 2 << 30
            }, host: gpuHost { $0.pools[0].freeBytes = 5 << 30 }),
        Case(
            testDescription: "overcommitted pool", severity: .warning, subject: "pool main",
            contains: "can grow to 100 GiB",
            manifest: manifest {
                $0.disks[0].source.variant = "streamOptimized"
                $0.disks[0].source.length = 2 << 30
            }, host: gpuHost { $0.pools[0].freeBytes = 50 << 30 }),
        Case(
            testDescription: "full pool, with the source's files kept", subject: "pool main",
            contains: "the VMDK files kept beside them need about 150 GiB",
            manifest: manifest {
                ($0.source.kind, $0.source.url) = (.vsphere, "vsphere://me@vcenter/DC?snapshot=1&staged=1")
            }, host: gpuHost { $0.pools[0].freeBytes = 149 << 30 }),
        Case(
            testDescription: "absurd capacities don't trap", subject: "pool main", contains: "need about 16384 PiB",
            manifest: manifest {
                $0.disks = (0..<3).map { n in .with { ($0.id, $0.capacityBytes) = ("disk\(n)", .max) } }
            }),
        Case(
            testDescription: "name taken", subject: "vm", contains: "already has a domain web (u-1)",
            host: gpuHost { $0.domains = [.with { ($0.name, $0.uuid, $0.migrationID) = ("web", "u-1", "m-2") }] }),
        Case(
            testDescription: "UUID taken", subject: "vm", contains: "domain old of host kvm1 already has the UUID",
            manifest: manifest { $0.vm.biosUuid = "564D0000-0000-0000-0000-000000000001" },
            options: options { $0.keepUuid = true },
            host: gpuHost {
                $0.domains = [.with { ($0.name, $0.uuid) = ("old", "564d0000-0000-0000-0000-000000000001") }]
            }),
        Case(
            testDescription: "bad domain name", subject: "vm", contains: "can't be a domain's name",
            options: options { $0.domainName = "../etc" }),
        Case(
            testDescription: "too much memory", subject: "vm", contains: "1 TiB of memory",
            manifest: manifest { $0.vm.memory.bytes = 1 << 40 }),
        Case(
            testDescription: "more CPUs than the host", severity: .warning, subject: "vm", contains: "128 CPUs",
            manifest: manifest { $0.vm.cpu.count = 128 }),
        Case(
            testDescription: "export's own verdict", subject: "disk0", contains: "physical RDM",
            manifest: manifest {
                $0.findings = [.blocked("disk0", "disk0 is a physical RDM", remedy: "copy it")]
            }),
        Case(
            testDescription: "export's own warning", severity: .warning, subject: "vm", contains: "connected to pipe",
            manifest: manifest {
                $0.findings = [.warning("vm", "its serial port is connected to pipe '/tmp/com'", remedy: "connect it")]
            }),
        Case(
            testDescription: "disk that forgets", severity: .warning, subject: "disk0", contains: "forgets its changes",
            manifest: manifest { $0.disks[0].mode = "independent_nonpersistent" }),
        Case(
            testDescription: "TPM, as the capture says it", severity: .warning, subject: "vm",
            contains: "new, empty TPM",
            manifest: manifest {
                $0.vm.tpm = true
                $0.findings = [.warning("vm", "its virtual TPM's secrets can't be carried", remedy: "-")]
            }),
        Case(
            testDescription: "vGPU without a profile", subject: "gpu0", contains: "without a profile",
            manifest: manifest { $0.gpus = [.with { ($0.id, $0.vgpu) = ("gpu0", VgpuBacking()) }] }),
    ]

    @Test(arguments: cases) func finds(_ test: Case) throws {
        let findings = preflight(
            manifest: test.manifest, options: test.options, pool: test.pool, diskFormat: test.format, host: test.host)
        #expect(findings.count == 1, "\(findings.map(\.message))")
        let finding = try #require(findings.first)
        #expect(finding.severity == test.severity && finding.subject == test.subject)
        #expect(finding.message.contains(test.contains), "\(finding.message)")
        #expect(!finding.remedy.isEmpty)
    }

    @Test func aRepeatedDeployIsNotInItsOwnWay() {
        let host = gpuHost {
            $0.domains = [.with { ($0.name, $0.uuid, $0.migrationID) = ("web", "u-1", "m-1") }]
            $0.pciFunctions[3].inUseBy = inUseBy(domain: "web")
            $0.pciFunctions[4].inUseBy = inUseBy(domain: "web")
            $0.pools[0].freeBytes = 1
        }
        let manifest = Self.manifest {
            $0.gpus = [passthrough("gpu0", 0x10de, 0x2204)]
            $0.disks[0].target.path = "/pool/web-disk0.qcow2"
        }
        #expect(preflight(manifest: manifest, options: Self.options(), pool: "main", host: host).isEmpty)
        let match = deviceMatch(manifest: manifest, options: Self.options(), host: host)
        #expect(match.devices.map { $0.map(\.address) } == [["0000:86:00.0", "0000:86:00.1"]])
        let dropped = Self.options { $0.gpu = .gpuDrop }
        #expect(deviceMatch(manifest: manifest, options: dropped, host: host).devices.isEmpty)
        // The same device in another migration's domain is not free.
        var other = manifest
        other.migrationID = "m-2"
        #expect(!deviceMatch(manifest: other, options: Self.options(), host: host).isComplete)
    }

    @Test(arguments: [
        ("web", "web"), ("Web_01.prod+x", "Web_01.prod+x"), ("my vm", "my-vm"), ("../../etc/passwd", "etc-passwd"),
        ("-rf", "rf"), (".hidden", "hidden"), ("a]]>b<c&\"d'", "a-b-c-d"),
        ("tab\tnew\nline\u{1}\u{0}x", "tab-new-line-x"),
        ("trailing...", "trailing"), ("ß🚀é", "vm-"), ("", "vm-"), ("///", "vm-"),
    ])
    func namesDomains(_ vmName: String, _ expected: String) {
        let name = domainName(for: vmName)
        #expect(expected == "vm-" ? name.hasPrefix("vm-") && name.count == 11 : name == expected)
        #expect(isValidDomainName(name) && domainName(for: vmName) == name)
    }

    /// Letters of other scripts can't be kept, but tell names apart.
    @Test func namesOfOtherScriptsStayApart() {
        let names = ["Büro 1", "Baro 1", "机器 1", "学习 1", "größe", "grüße"].map { domainName(for: $0) }
        #expect(Set(names).count == names.count && names.allSatisfy(isValidDomainName), "\(names)")
        #expect(names[0].hasPrefix("B-ro-1-") && names[1] == "Baro-1" && names[2].hasPrefix("1-"))
    }

    @Test func longNamesStayApart() {
        let a = domainName(for: String(repeating: "x", count: 1000) + "a")
        let b = domainName(for: String(repeating: "x", count: 1000) + "b")
        #expect(a.utf8.count == 64 && b.utf8.count == 64 && a != b && isValidDomainName(a))
    }

    /// A node's page cache counts as free, its total does not; a host's own figure goes before.
    @Test func pinnedMemoryFits() throws {
        let folder = try TemporaryFolder("proc", "sys/devices/system/node/node0", "sys/devices/system/node/node1")
        let (sysfs, proc) = (Sysfs(root: "\(folder.path)/sys"), Sysfs(root: "\(folder.path)/proc"))
        func write(_ path: String, _ lines: [String]) throws {
            try Files.writeAtomically(Array((lines.joined(separator: "\n") + "\n").utf8), to: "\(folder.path)/\(path)")
        }
        for (node, free) in [(0, 1000), (1, 4000)] {
            try write(
                "sys/devices/system/node/node\(node)/meminfo",
                [
                    "Node \(node) MemTotal:       9000 kB", "Node \(node) MemFree:        \(free) kB",
                    "Node \(node) Active(file):    300 kB", "Node \(node) SReclaimable:    48 kB",
                ])
        }
        try write("proc/meminfo", ["MemTotal: 18000 kB", "MemFree: 5000 kB", "MemAvailable: 6000 kB"])
        func error(_ kibibytes: UInt64, _ nodes: [UInt32]) -> MigrationError? {
            failure { try requireMemory(kibibytes << 10, onNodes: nodes, sysfs: sysfs, proc: proc) }
        }
        #expect(error(1348, [0]) == nil)
        #expect(error(1349, [0])?.code == .resourceExhausted)
        #expect(error(1349, [0])?.message.contains("memory node 0") == true)
        #expect(error(5696, [0, 1]) == nil)
        #expect(error(5697, [0, 1]) != nil)
        #expect(error(6000, []) == nil)
        #expect(error(6001, [])?.message.contains("the host") == true)
        #expect(error(9000, [7]) == nil)
    }

    /// Huge pages are a number that the kernel keeps, whatever else is free.
    @Test func hugePagesAreThere() throws {
        let folder = try TemporaryFolder("proc", "sys/devices/system/node/node0")
        let (sysfs, proc) = (Sysfs(root: "\(folder.path)/sys"), Sysfs(root: "\(folder.path)/proc"))
        func write(_ path: String, _ text: String) throws {
            try Files.writeAtomically(Array(text.utf8), to: "\(folder.path)/\(path)")
        }
        try write(
            "proc/meminfo",
            "MemAvailable: 90000000 kB\nHugePages_Free: 600\nHugePages_Rsvd: 88\nHugepagesize: 2048 kB\n")
        try write("sys/devices/system/node/node0/meminfo", "Node 0 HugePages_Free:   256\n")
        func error(_ mebibytes: UInt64, _ nodes: [UInt32]) -> MigrationError? {
            failure { try requireMemory(mebibytes << 20, onNodes: nodes, hugepages: true, sysfs: sysfs, proc: proc) }
        }
        #expect(error(1024, []) == nil && error(512, [0]) == nil)
        #expect(error(1025, [])?.message.contains("the host has 1024 MiB of these free") == true)
        #expect(error(1025, [])?.hint?.contains("keep 1 more") == true)
        #expect(error(516, [0])?.message.contains("memory node 0") == true)
        #expect(error(516, [0])?.hint?.contains("keep 2 more") == true)
        // A kernel that tells of none: QEMU says it then.
        try write("proc/meminfo", "MemAvailable: 90000000 kB\n")
        #expect(error(1025, []) == nil)
    }
}
