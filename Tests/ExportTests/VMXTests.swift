import FlotillaProtocol
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Export

@Suite struct VMXTests {
    let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    static let esxi = """
        .encoding = "UTF-8"
        config.version = "8"
        virtualHW.version = "19"
        displayName = "train |22A|22 ünit"
        guestOS = "ubuntu-64"
        guestOS.detailed.data = "architecture='X86' bitness='64' prettyName='Ubuntu 22.04.3 LTS'"
        annotation = "line one|0Aline two"
        uuid.bios = "42 1c 8a 00 11 22 33 44-55 66 77 88 99 aa bb cc"
        uuid.location = "56 4d 00 00 11 22 33 44-55 66 77 88 99 aa bb cc"
        vc.uuid = "50 1c 8a 00 11 22 33 44-55 66 77 88 99 aa bb cc"
        firmware = "efi"
        uefi.secureBoot.enabled = "TRUE"
        numvcpus = "16"
        cpuid.coresPerSocket = "8"
        memSize = "131072"
        sched.cpu.min = "1000"
        sched.cpu.shares = "high"
        sched.cpu.max = "unlimited"
        sched.mem.min = "131072"
        sched.mem.shares = "normal"
        sched.mem.pin = "TRUE"
        vcpu.hotadd = "TRUE"
        mem.hotadd = "FALSE"
        numa.nodeAffinity = "0,1"
        ctkEnabled = "TRUE"
        hypervisor.cpuid.v0 = "FALSE"
        tools.syncTime = "FALSE"
        svga.vramSize = "8388608"
        scsi0.present = "TRUE"
        scsi0.virtualDev = "pvscsi"
        scsi0:0.deviceType = "scsi-hardDisk"
        scsi0:0.fileName = "train.vmdk"
        scsi0:0.present = "TRUE"
        scsi0:1.fileName = "data.vmdk"
        scsi0:1.mode = "independent-persistent"
        sata0.present = "TRUE"
        sata0:0.present = "TRUE"
        sata0:0.deviceType = "cdrom-image"
        sata0:0.fileName = "/vmfs/volumes/iso/ubuntu.iso"
        sata0:0.startConnected = "FALSE"
        nvme0:0.present = "TRUE"
        nvme0:0.fileName = "fast.vmdk"
        ethernet0.present = "TRUE"
        ethernet0.virtualDev = "vmxnet3"
        ethernet0.networkName = "prod"
        ethernet0.addressType = "vpx"
        ethernet0.generatedAddress = "00:50:56:9A:00:01"
        ethernet0.dvs.portgroupId = "dvportgroup-21"
        ethernet1.present = "TRUE"
        ethernet1.virtualDev = "e1000e"
        ethernet1.addressType = "static"
        ethernet1.address = "00:50:56:00:00:02"
        ethernet1.networkName = "mgmt"
        ethernet1.startConnected = "FALSE"
        serial0.present = "TRUE"
        serial0.fileType = "file"
        serial0.fileName = "console.log"
        floppy0.present = "FALSE"
        pciPassthru0.present = "TRUE"
        pciPassthru0.id = "00000:059:00.0"
        pciPassthru0.vendorId = "0x10de"
        pciPassthru0.deviceId = "0x20b5"
        pciPassthru0.class = "0x0302"
        pciPassthru0.systemId = "5c0f-1"
        pciPassthru1.present = "TRUE"
        pciPassthru1.systemId = "BYPASS"
        pciPassthru1.pfId = "00000:026:00.0"
        pciPassthru1.id = "00000:026:01.2"
        pciPassthru1.dvs.portgroupId = "dvportgroup-22"
        pciPassthru1.MACAddress = "00:50:56:9a:00:03"
        pciPassthru.use64bitMMIO = "TRUE"
        pciPassthru.64bitMMIOSizeGB = "128"
        guestinfo.userdata = "c2VjcmV0"
        bios.bootOrder = "cdrom,hdd,ethernet0"
        bios.hddOrder = "nvme0:0,scsi0:0"
        vtpm.present = "TRUE"

        """

    private func writeFlat(_ name: String, sectors: UInt64, kind: String = "vmfs", extra: String = "") throws {
        try folder.write("\(name)-flat.vmdk", [0])
        try folder.write(
            "\(name).vmdk",
            Image.descriptor(createType: kind, extents: ["RW \(sectors) VMFS \"\(name)-flat.vmdk\""], extra: extra))
    }

    @Test func esxiMachineInFull() throws {
        try writeFlat("train", sectors: 1 << 21, extra: "ddb.thinProvisioned = \"1\"")
        try writeFlat("data", sectors: 1 << 22)
        try folder.write("fast.vmdk", Image.sparse(sectors: 1 << 23, createType: "monolithicSparse"))
        try folder.write("train.vmx", Self.esxi)
        let manifest = try folder.capture("vmx", "train.vmx")
        let vm = manifest.vm
        #expect(vm.name == "train \"A\" ünit" && vm.annotation == "line one\nline two")
        #expect(vm.guestID == "ubuntu64Guest" && vm.guestFullName == "Ubuntu 22.04.3 LTS")
        #expect(vm.biosUuid == "421c8a00-1122-3344-5566-778899aabbcc")
        #expect(vm.instanceUuid == "501c8a00-1122-3344-5566-778899aabbcc")
        #expect(vm.hardwareVersion == "vmx-19" && vm.firmware == .efi && vm.secureBoot && vm.tpm)
        #expect(vm.cpu.count == 16 && vm.cpu.coresPerSocket == 8 && vm.cpu.shares == 32_000 && vm.cpu.hotAdd)
        #expect(vm.cpu.reservationMhz == 1000 && vm.cpu.limitMhz == 0 && vm.cpu.numaNodes == [0, 1])
        #expect(vm.memory.bytes == 128 << 30 && vm.memory.reservationLockedToMax && vm.memory.shares == 1_310_720)
        #expect(vm.changeTracking && vm.hypervisorHidden && vm.powerState == .poweredOff)
        #expect(vm.videoMemoryBytes == 8 << 20)
        #expect(vm.removables.map(\.backing) == ["/vmfs/volumes/iso/ubuntu.iso"])
        #expect(vm.serialPorts.map(\.backingKind) == ["file"])
        #expect(
            vm.bootOrder == ["cdrom", "disk:nvme0:0", "disk:scsi0:0", "disk:scsi0:1", "net:ethernet0"])

        #expect(manifest.disks.map(\.label) == ["scsi0:0", "scsi0:1", "nvme0:0"])
        #expect(manifest.disks.map(\.capacityBytes) == [1 << 30, 2 << 30, 4 << 30])
        #expect(manifest.disks.map(\.controller) == [.pvscsi, .pvscsi, .nvme])
        #expect(manifest.disks.map(\.boot) == [false, false, true])
        #expect(manifest.disks.map(\.mode) == ["persistent", "independent_persistent", "persistent"])
        #expect(manifest.disks[0].thin && manifest.disks[0].source.variant == "vmfs")
        #expect(manifest.disks[0].source.path == folder.path + "/train.vmdk" && manifest.disks[0].source.length == 0)

        #expect(manifest.nics.map(\.mac) == ["00:50:56:9a:00:01", "00:50:56:00:00:02", "00:50:56:9a:00:03"])
        #expect(manifest.nics.map(\.model) == ["vmxnet3", "e1000e", "sriov"])
        #expect(manifest.nics.map(\.connected) == [true, false, true])
        #expect(manifest.nics[0].portgroupKey == "dvportgroup-21" && manifest.nics[0].macKind == "vpx")
        #expect(manifest.gpus.map(\.passthrough.address) == ["0000:3b:00.0"])
        #expect(manifest.otherDevices.map(\.sriov.physicalFunction) == ["0000:1a:00.0"])
        #expect(manifest.extraConfig["pciPassthru.64bitMMIOSizeGB"] == "128")
        #expect(manifest.extraConfig["guestinfo.userdata"] == nil)
        #expect(!manifest.findings.contains { $0.severity == .blocked })
    }

    static let workstation = """
        #!/usr/bin/vmware
        .encoding = "windows-1252"
        displayName = "B\u{0}ro"
        guestOS = "windows9-64"
        memsize = "4096"
        ide0:0.present = "TRUE"
        ide0:0.fileName = "disk.vmdk"
        ide1:0.present = "TRUE"
        ide1:0.deviceType = "cdrom-raw"
        ide1:0.fileName = "auto detect"
        ethernet0.present = "TRUE"
        ethernet0.connectionType = "nat"
        ethernet0.addressType = "generated"
        ethernet0.generatedAddress = "00:0c:29:aa:bb:cc"
        usb.autoConnect.device0 = "path:1/2 vid:046d pid:c52b"

        """

    @Test func workstationMachineInWindowsCodePage() throws {
        let bytes = Array(Self.workstation.utf8).map { $0 == 0 ? 0xfc : $0 }
        try folder.write("a-s001.vmdk", [0])
        try folder.write("a-s002.vmdk", [0])
        try folder.write(
            "disk.vmdk",
            Image.descriptor(
                createType: "twoGbMaxExtentSparse",
                extents: ["RW 4192256 SPARSE \"a-s001.vmdk\"", "RW 4194304 SPARSE \"a-s002.vmdk\"", "RW 2048 ZERO"]))
        try folder.write("Win.vmx", bytes)
        let manifest = try folder.capture("vmx", "Win.vmx", vm: "Büro")
        #expect(manifest.vm.name == "Büro" && manifest.vm.guestID == "windows9_64Guest")
        #expect(manifest.vm.cpu.count == 1 && manifest.vm.firmware == .bios)
        #expect(manifest.disks[0].capacityBytes == (4_192_256 + 4_194_304 + 2048) * 512)
        #expect(manifest.disks[0].controller == .ide && manifest.disks[0].boot)
        #expect(manifest.nics[0].network == "nat" && manifest.nics[0].model == "e1000")
        #expect(manifest.vm.usbDevices.first?.vendorID == 0x046d && manifest.vm.usbDevices.first?.productID == 0xc52b)
        #expect(failure { try folder.capture("vmx", "Win.vmx", vm: "other") }?.code == .notFound)
    }

    @Test func snapshotsAndTheirChain() throws {
        try writeFlat("base", sectors: 2048)
        try folder.write("base-000001-delta.vmdk", [0])
        try folder.write(
            "base-000001.vmdk",
            Image.descriptor(
                createType: "vmfsSparse", parent: "fb183c20", hint: "base.vmdk",
                extents: ["RW 2048 VMFSSPARSE \"base-000001-delta.vmdk\""]))
        try folder.write("a.vmx", "displayName = \"a\"\nmemsize = \"64\"\nscsi0:0.fileName = \"base-000001.vmdk\"\n")
        try folder.write(
            "a.vmsd",
            """
            snapshot.current = "1"
            snapshot.numSnapshots = "1"
            snapshot0.uid = "1"
            snapshot0.displayName = "before update"
            snapshot0.createTimeHigh = "395000"
            snapshot0.createTimeLow = "-1"
            """)
        let manifest = try folder.capture("vmx", "a.vmx")
        #expect(manifest.disks[0].backingChain == ["base-000001.vmdk", "base.vmdk"].map { "\(folder.path)/\($0)" })
        #expect(manifest.vm.snapshots.map(\.name) == ["before update"] && manifest.vm.snapshots[0].current)
        #expect(manifest.findings.contains { $0.severity == .warning && $0.message.contains("1 snapshots") })
        let before = manifest.source.fingerprint
        try folder.write("base-000001-delta.vmdk", [0, 1])
        #expect(try fingerprint(of: manifest) != before)
    }

    struct Blocker: Sendable, CustomTestStringConvertible {
        let testDescription: String
        var lines = ""
        var createType = "vmfs"
        var directory: String?
        let says: String
    }

    static let blockers = [
        Blocker(testDescription: "multi-writer", lines: "scsi0:0.sharing = \"multi-writer\"", says: "multi-writer"),
        Blocker(testDescription: "shared bus", lines: "scsi0.sharedBus = \"physical\"", says: "shared bus"),
        Blocker(testDescription: "physical RDM", createType: "vmfsPassthroughRawDeviceMap", says: "physicalMode"),
        Blocker(testDescription: "virtual RDM", createType: "vmfsRawDeviceMap", says: "virtualMode"),
        Blocker(testDescription: "suspended", lines: "checkpoint.vmState = \"a.vmss\"", says: "suspended"),
        Blocker(testDescription: "running", directory: "a.vmx.lck", says: "in use: a.vmx.lck"),
        Blocker(testDescription: "running on NFS", directory: ".lck-3e0000000000", says: "in use: .lck-3e"),
    ]

    @Test(arguments: blockers) func blocked(_ example: Blocker) throws {
        try writeFlat("d", sectors: 2048, kind: example.createType)
        if let directory = example.directory { try Files.createDirectories("\(folder.path)/\(directory)") }
        try folder.write(
            "a.vmx", "displayName = \"a\"\nmemsize = \"64\"\nscsi0:0.fileName = \"d.vmdk\"\n\(example.lines)\n")
        let found = try folder.capture("vmx", "a.vmx").findings.filter { $0.severity == .blocked }
        #expect(found.count == 1 && found[0].message.contains(example.says), "\(found)")
        #expect(found.allSatisfy { !$0.remedy.isEmpty })
    }

    @Test(
        arguments: [
            ("ubuntu-64", "ubuntu64Guest"), ("rhel8-64", "rhel8_64Guest"), ("other-64", "otherGuest64"),
            ("windows2019srv-64", "windows2019srv_64Guest"), ("windows9srv-64", "windows9Server64Guest"),
            ("debian11-64", "debian11_64Guest"), ("winxppro", "winxpproGuest"), ("ubuntu64Guest", "ubuntu64Guest"),
        ])
    func guests(_ text: String, _ expected: String) { #expect(VMXGuest.identifier(text) == expected) }
}
