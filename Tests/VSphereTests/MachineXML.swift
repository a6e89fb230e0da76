import Export
import FlotillaProtocol
import HostKit

@testable import VSphere

/// A VM as the property collector tells it: shut down, with one disk on a SCSI controller and one network card. Tests
/// change what they are about.
struct MachineXML {
    var name = "web"
    var properties = [
        "runtime.powerState": "<val>poweredOff</val>", "config.firmware": "<val>efi</val>",
        "config.cpuAllocation": "<val><reservation>0</reservation><limit>-1</limit></val>",
        "config.memoryAllocation": "<val><reservation>0</reservation><limit>-1</limit></val>",
    ]
    var hardware = "<numCPU>4</numCPU><memoryMB>512</memoryMB><numCoresPerSocket>2</numCoresPerSocket>"
    var controller = "<sharedBus>noSharing</sharedBus>"
    /// Of the disk: besides its key, place and capacity; its backing's type, and what that has besides its file.
    var diskSize = "<capacityInKB>65536</capacityInKB><capacityInBytes>67108864</capacityInBytes>"
    var diskBacking = "VirtualDiskFlatVer2BackingInfo"
    var diskDetail = "<diskMode>persistent</diskMode>"
    var datastore = "ds-vmfs"
    /// More devices.
    var devices = ""
    /// Properties that the account may not see.
    var hidden: [String] = []

    static func device(_ type: String, _ key: Int, _ content: String) -> String {
        "<device xsi:type=\"\(type)\"><key>\(key)</key>\(content)</device>"
    }

    var xml: String {
        let disk = Self.device(
            "VirtualDisk", 2000,
            """
            <deviceInfo><label>Hard disk 1</label></deviceInfo><backing xsi:type="\(diskBacking)">\
            <fileName>[ssd 1] web/web.vmdk</fileName><datastore type="Datastore">\(datastore)</datastore>\(diskDetail)\
            </backing><controllerKey>1000</controllerKey><unitNumber>0</unitNumber>\(diskSize)
            """)
        let card = Self.device(
            "VirtualVmxnet3", 4000,
            """
            <backing xsi:type="VirtualEthernetCardNetworkBackingInfo"><deviceName>VM Network</deviceName></backing>\
            <addressType>assigned</addressType><macAddress>00:50:56:00:00:01</macAddress>
            """)
        let bus = Self.device("ParaVirtualSCSIController", 1000, "<busNumber>0</busNumber>\(controller)")
        var all = properties
        if !hardware.isEmpty { all["config.hardware"] = "<val>\(hardware)\(bus)\(disk)\(card)\(devices)</val>" }
        all["name"] = "<val>\(name)</val>"
        return objectXML("VirtualMachine", "vm-\(name)", all, hidden: hidden)
    }

    /// What the server has besides VMs.
    var places = [
        ("ds-vmfs", "ssd 1", "VMFS"), ("ds-vsan", "vsan", "vsan"), ("ds-vvol", "arrays", "VVOL"),
    ].map { id, name, kind in
        objectXML("Datastore", id, ["name": "<val>\(name)</val>", "summary.type": "<val>\(kind)</val>"])
    }

    /// What a capture over the wire makes of it.
    ///
    /// - Parameter query: of the source: "?snapshot=1".
    func captured(_ query: String = "") throws -> Manifest {
        let server = try FakeVCenter(places: places, machines: [xml])
        let source = try VSphereURL(parsing: "vsphere://me@\(server.authority)/\(query)")
        let client = try server.client()
        defer { client.close() }
        var found: [Manifest] = []
        try Inventory(client, source, stop: StopFlag()).virtualMachines(stop: StopFlag()) { found.append($0) }
        return found[0]
    }
}
