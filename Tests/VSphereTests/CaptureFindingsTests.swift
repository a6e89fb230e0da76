import FlotillaProtocol
import Testing

@testable import VSphere

/// What stands in the way of a VM, or is not carried, and no other stage could know.
@Suite struct CaptureFindingsTests {
    struct Case: Sendable, CustomTestStringConvertible {
        let name: String
        var query = ""
        let severity: Finding.Severity
        var subject = "vm"
        /// Of the message.
        let words: String
        let change: @Sendable (inout MachineXML) -> Void

        init(
            _ name: String, query: String = "", _ severity: Finding.Severity, of subject: String = "vm",
            _ words: String,
            _ change: @escaping @Sendable (inout MachineXML) -> Void
        ) {
            (self.name, self.query, self.severity, self.subject) = (name, query, severity, subject)
            (self.words, self.change) = (words, change)
        }

        var testDescription: String { name + query }
    }

    private static func with(_ type: String, _ key: Int = 9000, _ content: String = "")
        -> @Sendable (
            inout MachineXML
        ) -> Void
    {
        { $0.devices = MachineXML.device(type, key, content) }
    }

    private static func set(_ path: String, _ value: String) -> @Sendable (inout MachineXML) -> Void {
        { $0.properties[path] = value }
    }

    private static func disk(_ detail: String) -> @Sendable (inout MachineXML) -> Void { { $0.diskDetail = detail } }

    private static func rdm(_ mode: String) -> @Sendable (inout MachineXML) -> Void {
        {
            $0.diskBacking = "VirtualDiskRawDiskMappingVer1BackingInfo"
            $0.diskDetail = "<compatibilityMode>\(mode)</compatibilityMode><diskMode>persistent</diskMode>"
        }
    }

    private static func runningWith(_ backing: String) -> @Sendable (inout MachineXML) -> Void {
        {
            $0.properties["runtime.powerState"] = "<val>poweredOn</val>"
            $0.devices = MachineXML.device(
                "VirtualPCIPassthrough", 13000, "<backing xsi:type=\"VirtualPCIPassthrough\(backing)BackingInfo\"/>")
        }
    }

    private static let key = "<keyId>k</keyId><providerId><id>kms</id></providerId>"
    private static let snapshots = set(
        "snapshot",
        """
        <val><currentSnapshot type="VirtualMachineSnapshot">s-2</currentSnapshot><rootSnapshotList><snapshot \
        type="VirtualMachineSnapshot">s-1</snapshot><name>a%2fb</name><childSnapshotList><snapshot \
        type="VirtualMachineSnapshot">s-2</snapshot><name>c</name></childSnapshotList></rootSnapshotList></val>
        """)

    static let cases: [Case] = [
        Case("fault tolerance", .blocked, "fault tolerant", set("config.ftInfo", "<val><role>1</role></val>")),
        Case("NVDIMM", .blocked, "persistent memory", with("VirtualNVDIMM")),
        Case("SCSI passthrough", .blocked, "SCSI device of the source host", with("VirtualSCSIPassthrough")),
        Case(
            "encrypted disk", .blocked, of: "disk0", "encrypted",
            disk("<diskMode>persistent</diskMode><keyId>\(key)</keyId>")),
        Case("encrypted VM", .blocked, "the VM is encrypted", set("config.keyId", "<val>\(key)</val>")),
        Case(
            "independent disk", query: "?snapshot=1", .blocked, of: "disk0", "no snapshot covers",
            disk("<diskMode>independent_persistent</diskMode>")),
        Case(
            "independent disk", .warning, of: "disk0", "no snapshot of the VM",
            disk("<diskMode>independent_persistent</diskMode>")),
        Case(
            "disk that forgets", .warning, of: "disk0", "forgets its changes",
            disk("<diskMode>independent_nonpersistent</diskMode>")),
        Case(
            "disk that forgets", query: "?snapshot=1", .blocked, of: "disk0", "no snapshot covers",
            disk("<diskMode>independent_nonpersistent</diskMode>")),
        Case("physical RDM", .blocked, of: "disk0", "in physical mode", rdm("physicalMode")),
        Case("virtual RDM", .warning, of: "disk0", "in virtual mode", rdm("virtualMode")),
        Case(
            "virtual RDM", query: "?via=datastore", .blocked, of: "disk0", "no flat file of datastore",
            rdm("virtualMode")),
        Case("local disk", .blocked, of: "disk0", "in physical mode") {
            $0.diskBacking = "VirtualDiskRawDiskVer2BackingInfo"
        },
        Case("vSAN", query: "?via=datastore", .blocked, of: "disk0", "no flat file of datastore vsan (vsan)") {
            $0.datastore = "ds-vsan"
        },
        Case("vVol", query: "?via=datastore", .blocked, of: "disk0", "no flat file of datastore arrays (VVOL)") {
            $0.datastore = "ds-vvol"
        },
        Case("snapshots", .warning, "it has 2 snapshots", snapshots),
        Case("snapshots", query: "?via=datastore", .blocked, "with snapshots its disks are no flat files", snapshots),
        Case(
            "multi-writer disk", .blocked, of: "disk0", "shared with other VMs",
            disk("<diskMode>persistent</diskMode><sharing>sharingMultiWriter</sharing>")),
        Case("shared bus", .blocked, of: "disk0", "shared with other VMs") {
            $0.controller = "<sharedBus>physicalSharing</sharedBus>"
        },
        Case("no size", .blocked, of: "disk0", "states no size") { $0.diskSize = "" },
        Case("strange controller", .blocked, "a controller this program doesn't know") {
            $0.devices = MachineXML.device(
                "VirtualDisk", 2001,
                "<deviceInfo><label>Hard disk 2</label></deviceInfo><controllerKey>77</controllerKey>")
        },
        Case("running", .blocked, "the VM is running", set("runtime.powerState", "<val>poweredOn</val>")),
        Case(
            "running", query: "?snapshot=1", .warning, "what it writes later is not",
            set("runtime.powerState", "<val>poweredOn</val>")),
        Case("running with a device", .blocked, "the VM is running", runningWith("Device")),
        Case(
            "running with a device", query: "?snapshot=1", .blocked, "vSphere makes no snapshot", runningWith("Device")),
        Case(
            "running with a dynamic device", query: "?snapshot=1", .blocked, "vSphere makes no snapshot",
            runningWith("Dynamic")),
        Case("running with a vGPU", query: "?snapshot=1", .warning, "not every vSphere", runningWith("Vmiop")),
        Case("running with a virtual function", query: "?snapshot=1", .blocked, "vSphere makes no snapshot") {
            $0.properties["runtime.powerState"] = "<val>poweredOn</val>"
            $0.devices = MachineXML.device("VirtualSriovEthernetCard", 4001, "")
        },
        Case("suspended", .blocked, "suspended", set("runtime.powerState", "<val>suspended</val>")),
        Case("unknown power state", .blocked, "power state is not known") { $0.properties["runtime.powerState"] = nil },
        Case("unreachable", .blocked, "no configuration of it (connection state: orphaned)") {
            $0.hardware = ""
            $0.properties["runtime.connectionState"] = "<val>orphaned</val>"
        },
        Case("firmware", .blocked, "neither bios nor efi", set("config.firmware", "<val>tianocore</val>")),
        Case("no memory", .blocked, "no usable memory size") { $0.hardware = "<numCPU>1</numCPU>" },
        Case("vTPM", .warning, "virtual TPM's secrets", with("VirtualTPM")),
        Case("odd topology", .warning, "no multiple of") {
            $0.hardware = "<numCPU>3</numCPU><numCoresPerSocket>2</numCoresPerSocket><memoryMB>4</memoryMB>"
        },
        Case(
            "two of one MAC", .blocked, of: "nic1", "the same MAC address",
            with("VirtualE1000", 4001, "<macAddress>00:50:56:00:00:01</macAddress>")),
        Case("SR-IOV card", .warning, of: "nic1", "SR-IOV network function", with("VirtualSriovEthernetCard", 4001)),
        Case("RDMA card", .warning, of: "nic1", "RDMA adapter", with("VirtualVmxnet3Vrdma", 4001)),
        Case(
            "USB device", .warning, "USB device 'stick'",
            with("VirtualUSB", 9000, "<backing><deviceName>stick</deviceName></backing>")),
        Case(
            "serial port", .warning, "connected to pipe '/tmp/com'",
            with(
                "VirtualSerialPort", 9000,
                "<backing xsi:type=\"VirtualSerialPortPipeBackingInfo\"><pipeName>/tmp/com</pipeName></backing>")),
        Case("parallel port", .warning, "not carried", with("VirtualParallelPort")),
        Case(
            "future device", .warning, "VirtualWarpDrive) is a device this program doesn't know",
            with("VirtualWarpDrive")),
        Case("sound card", .note, "(sound) is not carried", with("VirtualHdAudioCard")),
        Case("hidden", .warning, "does not show the account config.extraConfig") {
            $0.hidden = ["config.extraConfig"]
        },
        Case("template", .note, "it is a template", set("config.template", "<val>true</val>")),
    ]

    @Test(arguments: cases) func areSaid(_ each: Case) throws {
        var machine = MachineXML()
        each.change(&machine)
        let findings = try machine.captured(each.query).findings
        let found = findings.filter { $0.subject == each.subject && $0.message.contains(each.words) }
        #expect(found.map(\.severity) == [each.severity], "\(findings)")
        #expect(each.severity == .note || found.allSatisfy { !$0.remedy.isEmpty })
        // Of no use to such a VM.
        #expect(!each.name.hasPrefix("running with") || !findings.contains { $0.remedy.contains("--snapshot") })
    }

    /// Nothing is said of an ordinary VM, nor of what the way its disks are read makes harmless.
    @Test(arguments: ["", "?via=datastore", "?snapshot=1"]) func anOrdinaryMachineHasNone(_ query: String) throws {
        #expect(try MachineXML().captured(query).findings == [])
        var machine = MachineXML()
        machine.datastore = "ds-vsan"
        #expect(try machine.captured().findings == [])
    }

    /// The disk's key is the VM's.
    @Test func anEncryptedMachineIsSaidOnce() throws {
        var machine = MachineXML()
        machine.properties["config.keyId"] = "<val>\(Self.key)</val>"
        machine.diskDetail = "<diskMode>persistent</diskMode><keyId>\(Self.key)</keyId>"
        let manifest = try machine.captured()
        #expect(manifest.findings.filter { $0.message.contains("encrypted") }.count == 1)
        #expect(manifest.vm.encrypted)
    }
}
