import Export
import FlotillaProtocol
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct OVFTests {
    let folder: TemporaryFolder
    let image = Image.sparse(sectors: 16_777_216)

    init() throws { folder = try TemporaryFolder() }

    @Test func vCenterExportInFull() throws {
        try folder.write("gpu node-1.vmdk", Image.sparse(sectors: 16 << 21))
        try folder.write("gpu node-2.vmdk", Image.sparse(sectors: 1 << 21))
        try folder.write("gpu node.ovf", OVFText.vcenter)
        let digest = hex(Digest.hash(.sha256, Array(OVFText.vcenter.utf8)))
        let promised = String(repeating: "ab", count: 20)
        try folder.write(
            "gpu node.mf", "SHA256(gpu node.ovf)= \(digest)\r\nSHA1 (gpu node-1.vmdk) = \(promised.uppercased())\r\n")
        try folder.write("gpu node.cert", "-----BEGIN CERTIFICATE-----")
        let manifest = try folder.capture("ovf", "gpu node.ovf")

        #expect(manifest.schemaVersion == 1)
        #expect(manifest.source.kind == .ovf)
        #expect(manifest.source.path == folder.path + "/gpu node.ovf")
        #expect(manifest.source.descriptorSha256 == digest)
        let vm = manifest.vm
        #expect(vm.name == "gpu node")
        #expect(vm.guestID == "ubuntu64Guest")
        #expect(vm.guestFullName == "Ubuntu Linux (64-bit)")
        #expect(vm.hardwareVersion == "vmx-20")
        #expect(vm.firmware == .efi && vm.secureBoot && vm.tpm && vm.hypervisorHidden)
        #expect(vm.annotation == "first line\nsecond line")
        #expect(vm.cpu.count == 8 && vm.cpu.coresPerSocket == 4 && vm.cpu.reservationMhz == 2000)
        #expect(vm.cpu.shares == 8000 && vm.cpu.hotAdd && !vm.memory.hotAdd)
        #expect(vm.memory.bytes == 64 << 30 && vm.memory.reservationLockedToMax)
        #expect(vm.videoMemoryBytes == 16 << 20)
        #expect(vm.removables.count == 1 && vm.removables[0].kind == .cdrom && !vm.removables[0].connected)

        #expect(manifest.disks.map(\.label) == ["Hard disk 1", "Hard disk 2"])
        #expect(manifest.disks.map(\.controller) == [.pvscsi, .nvme])
        #expect(manifest.disks.map(\.capacityBytes) == [16 << 30, 1 << 30])
        #expect(manifest.disks.map(\.boot) == [true, false])
        #expect(manifest.disks[0].unitNumber == 1 && manifest.disks[0].mode == "independent_persistent")
        #expect(manifest.disks[0].uuid == "6000c29a-2b11-2233-4455-66778899aabb")
        let content = manifest.disks[0].source
        #expect(content.path == folder.path + "/gpu node-1.vmdk")
        #expect(content.format == "vmdk" && content.variant == "streamOptimized")
        #expect(content.expected.map(\.algorithm) == ["sha1"] && content.expected[0].hex == promised)

        #expect(manifest.nics.count == 1)
        #expect(manifest.nics[0].mac == "00:50:56:9a:11:22" && manifest.nics[0].model == "vmxnet3")
        #expect(manifest.nics[0].network == "prod & test" && manifest.nics[0].connected)
        #expect(manifest.gpus.count == 1 && manifest.gpus[0].vgpu.profile == "grid_a100-40c")
        #expect(manifest.gpus[0].config == ["cfg.enable_uvm": "1"])
        #expect(
            manifest.extraConfig == [
                "pciPassthru.use64bitMMIO": "TRUE", "hypervisor.cpuid.v0": "FALSE", "nestedHVEnabled": "true",
            ])
        #expect(manifest.findings.contains { $0.message.contains("signature is not checked") })
        #expect(!manifest.findings.contains { $0.severity == .blocked })
    }

    @Test func virtualBoxExport() throws {
        try folder.write("box-disk001.vmdk", Image.sparse(sectors: 1 << 21))
        try folder.write("box.ovf", OVFText.virtualBox)
        let manifest = try folder.capture("ovf", "box.ovf")
        #expect(manifest.vm.name == "box" && manifest.vm.guestID == "debian10_64Guest")
        #expect(manifest.vm.firmware == .bios && manifest.vm.memory.bytes == 2 << 30)
        #expect(manifest.disks.map(\.controller) == [.sata])
        #expect(manifest.nics[0].model == "e1000" && manifest.nics[0].mac.isEmpty)
        #expect(!manifest.findings.contains { $0.severity.rawValue >= Finding.Severity.warning.rawValue })
    }

    @Test func archiveIsReadInPlace() throws {
        let text = OVFText.small()
        let mf = "SHA256(web.ovf)= \(hex(Digest.hash(.sha256, Array(text.utf8))))\n"
        let archive = Tar.archive([
            .init(name: "web.ovf", data: Array(text.utf8)), .init(name: "web.mf", data: Array(mf.utf8)),
            .init(name: "web-disk1.vmdk", data: image),
        ])
        try folder.write("web.ova", archive)
        let manifest = try folder.capture("ova", "web.ova")
        let content = manifest.disks[0].source
        #expect(content.path == folder.path + "/web.ova" && content.length == UInt64(image.count))
        #expect(try File(content.path, 0).readExactly(at: content.offset, count: 4) == Array("KDMV".utf8))
        #expect(manifest.disks[0].capacityBytes == 8 << 30)
        #expect(!manifest.findings.contains { $0.message.contains("first member") })
    }

    @Test func descriptorElsewhereInTheArchiveIsNoted() throws {
        try folder.write(
            "web.ova",
            Tar.archive([
                .init(name: "web-disk1.vmdk", data: image), .init(name: "web.ovf", data: Array(OVFText.small().utf8)),
            ]))
        let manifest = try folder.capture("ova", "web.ova")
        #expect(manifest.findings.contains { $0.message.contains("first member") })
    }

    @Test func archiveWithoutDescriptor() throws {
        try folder.write("web.ova", Tar.archive([.init(name: "a.txt", data: [1])]))
        #expect(failure { try folder.capture("ova", "web.ova") }?.message.contains("no .ovf") == true)
    }

    @Test func collectionNeedsAName() throws {
        let one = OVFText.small()
        guard let start = one.firstRange(of: "<VirtualSystem "), let end = one.firstRange(of: "</VirtualSystem>") else {
            Issue.record("no system in the fixture")
            return
        }
        let system = String(one[start.lowerBound..<end.upperBound])
        let other = system.replacing("<Name>web</Name>", with: "<Name>db</Name>").replacing("\"web\"", with: "\"id2\"")
        let text = one.replacing(
            system, with: "<VirtualSystemCollection ovf:id=\"c\">\(system)\(other)</VirtualSystemCollection>")
        try folder.write("web-disk1.vmdk", image)
        try folder.write("web.ovf", text)
        let error = failure { try folder.capture("ovf", "web.ovf") }
        #expect(error?.message.contains("2 VMs: web, db") == true && error?.hint?.contains("--vm") == true)
        #expect(try folder.capture("ovf", "web.ovf", vm: "db").vm.name == "db")
        #expect(try folder.capture("ovf", "web.ovf", vm: "id2").vm.name == "db")
        #expect(failure { try folder.capture("ovf", "web.ovf", vm: "mail") }?.code == .notFound)
    }

    @Test func emptyDiskIsBlocked() throws {
        try folder.write("web-disk1.vmdk", image)
        try folder.write("web.ovf", OVFText.small(disk: "<Disk ovf:capacity=\"1073741824\" ovf:diskId=\"vmdisk1\"/>"))
        let manifest = try folder.capture("ovf", "web.ovf")
        let finding = manifest.findings.first { $0.severity == .blocked }
        #expect(finding?.subject == "disk0" && finding?.message.contains("empty") == true)
        #expect(finding?.remedy.isEmpty == false && !manifest.disks[0].hasSource)
    }

    @Test func deploymentOptions() throws {
        try folder.write("web-disk1.vmdk", image)
        let options = """
            <DeploymentOptionSection><Info>o</Info><Configuration ovf:id="small"/>
            <Configuration ovf:id="large" ovf:default="true"/></DeploymentOptionSection><DiskSection>
            """
        let large = OVFText.item(1, 3, "<rasd:VirtualQuantity>16</rasd:VirtualQuantity>")
            .replacing("<Item>", with: "<Item ovf:configuration=\"large\">")
        let tiny = OVFText.item(1, 3, "<rasd:VirtualQuantity>1</rasd:VirtualQuantity>")
            .replacing("<Item>", with: "<Item ovf:configuration=\"small\">")
        try folder.write("web.ovf", OVFText.small(items: large + tiny).replacing("<DiskSection>", with: options))
        #expect(try folder.capture("ovf", "web.ovf").vm.cpu.count == 16)
    }

    @Test func bootOrder() throws {
        try folder.write("web-disk1.vmdk", image)
        let nic = OVFText.item(
            9, 10, "<rasd:Connection>VM Network</rasd:Connection><rasd:ResourceSubType>E1000</rasd:ResourceSubType>")
        let order = ["9", "4", "77"].map {
            "<vmw:BootOrderSection vmw:instanceId=\"\($0)\" vmw:type=\"disk\"><Info>boot order</Info></vmw:BootOrderSection>"
        }.joined()
        try folder.write("web.ovf", OVFText.small(nics: nic, sections: order))
        let manifest = try folder.capture("ovf", "web.ovf")
        #expect(manifest.vm.bootOrder == ["net:ethernet0", "disk:scsi0:0"] && manifest.disks[0].boot)
        #expect(!manifest.findings.contains { $0.message.contains("section") })
    }

    @Test func damagedDescriptorInAnArchive() throws {
        try folder.write(
            "web.ova",
            Tar.archive([
                .init(name: "web.ovf", data: Array(OVFText.small().utf8)),
                .init(name: "web.mf", data: Array("SHA1(web.ovf)= \(String(repeating: "1", count: 40))\n".utf8)),
                .init(name: "web-disk1.vmdk", data: image),
            ]))
        let error = try #require(failure { try folder.capture("ova", "web.ova") })
        let actual = hex(Digest.hash(.sha1, Array(OVFText.small().utf8)))
        #expect(error.code == .dataLoss && error.message.contains(actual), "\(error)")
    }

    /// Digests that somebody gave count; which these are nobody can tell.
    @Test func twoDigestListsOfOtherNames() throws {
        let zero = Array("SHA1(web.ovf)= \(String(repeating: "0", count: 40))\n".utf8)
        try folder.write(
            "web.ova",
            Tar.archive([
                .init(name: "web.ovf", data: Array(OVFText.small().utf8)), .init(name: "a.mf", data: zero),
                .init(name: "b.mf", data: zero), .init(name: "web-disk1.vmdk", data: image),
            ]))
        let error = try #require(failure { try folder.capture("ova", "web.ova") })
        #expect(error.code == .invalidArgument && error.message.contains("none is called web.mf"), "\(error)")
    }

    @Test func passthroughItems() throws {
        try folder.write("web-disk1.vmdk", image)
        let dynamic = OVFText.item(
            20, 1,
            """
            <rasd:ResourceSubType>vmware.pcipassthrough</rasd:ResourceSubType>
            <vmw:Config vmw:key="backing.allowedDevices" vmw:value="0x10de:0x20f1"/>
            <vmw:Config vmw:key="backing.customLabel" vmw:value="Training"/>
            <vmw:Config vmw:key="slotInfo.pciSlotNumber" vmw:value="64"/>
            """)
        try folder.write("web.ovf", OVFText.small(items: dynamic))
        let gpu = try #require(try folder.capture("ovf", "web.ovf").gpus.first)
        #expect(gpu.dynamic.customLabel == "Training" && gpu.dynamic.allowed.first?.device == 0x20f1)
        #expect(gpu.guestSlot == 64 && gpu.label == "item 20")
    }

    /// Keys belong to the device of their number, whichever devices have any, and don't say what it is.
    @Test func keysGoToTheDeviceOfTheirNumber() throws {
        try folder.write("web-disk1.vmdk", image)
        func item(_ id: Int, _ subtype: String, _ more: String) -> String {
            OVFText.item(id, 1, "<rasd:ResourceSubType>vmware.\(subtype)</rasd:ResourceSubType>\(more)")
        }
        let whole = """
            <vmw:Config vmw:key="backing.vendorId" vmw:value="0x10de"/>\
            <vmw:Config vmw:key="backing.deviceId" vmw:value="0x20f1"/>
            """
        let keys = [("vgpu", "grid_a100-40c"), ("virtualDev", "vmiop"), ("cfg.enable_uvm", "1")].map {
            "<vmw:ExtraConfig vmw:key=\"pciPassthru1.\($0)\" vmw:value=\"\($1)\"/>"
        }
        try folder.write(
            "web.ovf",
            OVFText.small(
                items: item(20, "pcipassthrough", whole)
                    + item(21, "vmiop.vgpu", "<rasd:HostResource>grid_a100-10c</rasd:HostResource>"),
                settings: keys.joined()))
        let gpus = try folder.capture("ovf", "web.ovf").gpus
        #expect(gpus.map(\.passthrough.id.device) == [0x20f1, 0] && gpus.map(\.vgpu.profile) == ["", "grid_a100-10c"])
        #expect(gpus.map(\.config) == [[:], ["cfg.enable_uvm": "1"]])
    }
}
