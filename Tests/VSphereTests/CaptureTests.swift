import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import Testing

@testable import VSphere

/// What a capture carries, beyond what comparisons with a simulator show.
@Suite struct CaptureTests {
    @Test func limitsAndReservationsAreCarried() throws {
        var machine = MachineXML()
        machine.properties["config.cpuAllocation"] = """
            <val><reservation>1500</reservation><limit>3000</limit><shares><shares>4000</shares></shares></val>
            """
        machine.properties["config.memoryAllocation"] = """
            <val><reservation>256</reservation><limit>384</limit><shares><shares>5120</shares></shares></val>
            """
        machine.properties["config.memoryReservationLockedToMax"] = "<val>true</val>"
        let vm = try machine.captured().vm
        #expect(vm.cpu.count == 4 && vm.cpu.coresPerSocket == 2)
        #expect(vm.cpu.reservationMhz == 1500 && vm.cpu.limitMhz == 3000 && vm.cpu.shares == 4000)
        #expect(vm.memory.bytes == 512 << 20 && vm.memory.reservationLockedToMax)
        #expect(vm.memory.reservationBytes == 256 << 20 && vm.memory.limitBytes == 384 << 20)
        #expect(vm.memory.shares == 5120)
    }

    /// -1 is none.
    @Test func noLimitIsNone() throws {
        let vm = try MachineXML().captured().vm
        #expect(vm.cpu.limitMhz == 0 && vm.memory.limitBytes == 0)
    }

    @Test func theBootOrderNamesDisksAndCards() throws {
        var machine = MachineXML()
        machine.devices = MachineXML.device(
            "VirtualDisk", 2001,
            """
            <backing xsi:type="VirtualDiskFlatVer2BackingInfo"><fileName>[ssd 1] web/b.vmdk</fileName></backing>\
            <controllerKey>1000</controllerKey><unitNumber>3</unitNumber><capacityInBytes>1048576</capacityInBytes>
            """)
        func entry(_ kind: String, _ key: Int? = nil) -> String {
            let device = key.map { "<deviceKey>\($0)</deviceKey>" } ?? ""
            return "<bootOrder xsi:type=\"VirtualMachineBootOptionsBootable\(kind)Device\">\(device)</bootOrder>"
        }
        machine.properties["config.bootOptions"] =
            "<val>\(entry("Cdrom"))\(entry("Ethernet", 4000))\(entry("Disk", 2001))\(entry("Disk", 2000))"
            + "\(entry("Disk", 4711))\(entry("Floppy"))<efiSecureBootEnabled>true</efiSecureBootEnabled></val>"
        let manifest = try machine.captured()
        #expect(
            manifest.vm.bootOrder == ["cdrom", "net:ethernet0", "disk:scsi0:3", "disk:scsi0:0", "floppy"])
        #expect(manifest.disks.map(\.label) == ["scsi0:0", "scsi0:3"])
        #expect(manifest.disks.map(\.boot) == [false, true])
        #expect(manifest.vm.secureBoot)
    }

    @Test func withoutABootOrderTheFirstDiskBoots() throws {
        let manifest = try MachineXML().captured()
        #expect(manifest.vm.bootOrder == [] && manifest.disks.map(\.boot) == [true])
    }

    /// A vendor's group of a GPU and its network card are two devices that know of each other.
    @Test func deviceGroupsAreNamed() throws {
        var machine = MachineXML()
        func device(_ key: Int, _ group: Int?, _ id: String) -> String {
            let of = group.map { "<deviceGroupInfo><groupInstanceKey>\($0)</groupInstanceKey></deviceGroupInfo>" } ?? ""
            return MachineXML.device(
                "VirtualPCIPassthrough", key,
                """
                <backing xsi:type="VirtualPCIPassthroughDeviceBackingInfo"><deviceName>\(id)</deviceName><id>\(id)</id>\
                <deviceId>8373</deviceId><systemId>host</systemId><vendorId>4318</vendorId></backing>\(of)
                """)
        }
        machine.devices =
            device(13000, 7, "0000:3b:00.0") + device(13001, 7, "0000:5e:00.0") + device(13002, 8, "0000:86:00.0")
            + device(13003, nil, "0000:af:00.0")
        machine.properties["config.deviceGroups"] = """
            <val><deviceGroup xsi:type="VirtualMachineVirtualDeviceGroupsVendorDeviceGroup">\
            <groupInstanceKey>7</groupInstanceKey><deviceGroupName>gpu &amp; nic</deviceGroupName></deviceGroup></val>
            """
        let manifest = try machine.captured()
        let devices = (manifest.gpus + manifest.otherDevices).sorted { $0.label < $1.label }
        #expect(devices.map(\.label) == (0..<4).map { "pciPassthru\($0)" })
        #expect(devices.map(\.deviceGroup) == ["gpu & nic", "gpu & nic", "group 8", ""])
    }

    /// What the VM will have is open while it is shut down: of the host's devices that would do, the first tells the kind.
    @Test func aDynamicDeviceIsDescribedByTheFirstThatWouldDo() throws {
        var machine = MachineXML()
        let numbers = 16..<48
        let functions = numbers.map { number in
            """
            <HostPciDevice><id>0000:\(String(number, radix: 16)):00.0</id><classId>770</classId><vendorId>4318</vendorId>\
            <deviceId>\(number)</deviceId><deviceName>GPU \(number)</deviceName></HostPciDevice>
            """
        }
        machine.places.append(
            objectXML(
                "HostSystem", "host-1",
                ["name": "<val>esx</val>", "hardware.pciDevice": "<val>\(functions.joined())</val>"]))
        machine.properties["runtime.host"] = "<val type=\"HostSystem\">host-1</val>"
        let allowed = numbers.dropFirst(3).reversed().map {
            "<allowedDevice><vendorId>4318</vendorId><deviceId>\($0)</deviceId></allowedDevice>"
        }
        machine.devices = MachineXML.device(
            "VirtualPCIPassthrough", 13000,
            "<backing xsi:type=\"VirtualPCIPassthroughDynamicBackingInfo\">\(allowed.joined())</backing>")
        let manifest = try machine.captured()
        #expect(manifest.gpus.map(\.name) == ["GPU 19"] && manifest.source.hostName == "esx")
    }

    /// At the address it had on another host, or before a card was added, may be something else by now.
    @Test(arguments: [false, true]) func aDeviceIsNotTakenForAnother(_ isThere: Bool) throws {
        var machine = MachineXML()
        func function(_ bus: String, _ code: Int, _ vendor: Int, _ id: Int, _ name: String) -> String {
            """
            <HostPciDevice><id>0000:\(bus):00.0</id><classId>\(code)</classId><vendorId>\(vendor)</vendorId>\
            <deviceId>\(id)</deviceId><deviceName>\(name)</deviceName></HostPciDevice>
            """
        }
        let functions =
            function("3b", 264, 5197, 43, "NVMe") + (isThere ? function("5e", 770, 4318, 8373, "A100") : "")
        machine.places.append(
            objectXML(
                "HostSystem", "host-1", ["name": "<val>esx</val>", "hardware.pciDevice": "<val>\(functions)</val>"]))
        machine.properties["runtime.host"] = "<val type=\"HostSystem\">host-1</val>"
        machine.devices =
            MachineXML.device(
                "VirtualPCIPassthrough", 13000,
                """
                <backing xsi:type="VirtualPCIPassthroughDeviceBackingInfo"><id>0000:3b:00.0</id>\
                <deviceId>8373</deviceId><systemId>host</systemId><vendorId>4318</vendorId></backing>
                """)
            + MachineXML.device(
                "VirtualPCIPassthrough", 13001,
                """
                <backing xsi:type="VirtualPCIPassthroughDynamicBackingInfo"><assignedId>0000:3b:00.0</assignedId>\
                <allowedDevice><vendorId>4318</vendorId><deviceId>8373</deviceId></allowedDevice></backing>
                """)
        let manifest = try machine.captured()
        #expect(
            manifest.gpus.map(\.classCode) == (isThere ? [0x302, 0x302] : [0, 0]) && manifest.otherDevices.isEmpty)
        #expect(manifest.gpus.map(\.name) == (isThere ? ["A100", "A100"] : ["", ""]))
        let warned = manifest.findings.filter { $0.message.contains("host esx has no device 0x10de:0x20b5") }
        #expect(warned.map(\.severity) == (isThere ? [] : [.warning]), "\(manifest.findings)")
    }

    @Test func snapshotsAreListedWithTheCurrentOne() throws {
        var machine = MachineXML()
        machine.properties["snapshot"] = """
            <val><currentSnapshot type="VirtualMachineSnapshot">s-2</currentSnapshot><rootSnapshotList><snapshot \
            type="VirtualMachineSnapshot">s-1</snapshot><name>a%2fb</name><createTime>2024-02-29T12:34:56.789Z</createTime>\
            <childSnapshotList><snapshot type="VirtualMachineSnapshot">s-2</snapshot><name>c</name>\
            <quiesced>true</quiesced></childSnapshotList></rootSnapshotList></val>
            """
        let snapshots = try machine.captured().vm.snapshots
        #expect(snapshots.map(\.name) == ["a/b", "c"])
        #expect(snapshots.map(\.current) == [false, true] && snapshots.map(\.quiesced) == [false, true])
        #expect(snapshots[0].createdAt.seconds == 1_709_210_096)
    }
}
