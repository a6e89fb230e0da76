import Export
import FlotillaProtocol
import MigrationModel

/// What a server has besides VMs. As JSON: the keys are the properties' names, ids are managed object ids.
package struct Infrastructure: Sendable, Encodable {
    package struct Datacenter: Sendable, Encodable {
        package var id: String
        package var name: String
        /// Through its folders: "Europe/DC1".
        package var path: String
    }

    package struct Cluster: Sendable, Encodable {
        package var id: String
        package var name: String
        package var datacenter: String
    }

    package struct Datastore: Sendable, Encodable {
        package var id: String
        package var name: String
        package var datacenter: String
        /// "VMFS", "NFS", "vsan"…
        package var kind: String
        package var capacityBytes: UInt64
        package var freeBytes: UInt64
        package var isAccessible: Bool
    }

    package struct Network: Sendable, Encodable {
        package var id: String
        package var name: String
        package var datacenter: String
        /// Of a distributed port group.
        package var key: String?
    }

    package struct Host: Sendable, Encodable {
        package var id: String
        package var name: String
        package var datacenter: String
        /// Empty for a host outside clusters.
        package var cluster: String
        /// Hardware UUID.
        package var uuid: String
        /// "VMware ESXi 8.0.1 build-22088125".
        package var product: String
        /// "poweredOn"; "connected"; as the API says.
        package var powerState: String
        package var connectionState: String
        package var cpuCores: UInt32
        package var memoryBytes: UInt64
        package var gpus: [HostGPU]
        /// vGPU profiles it offers: "grid_a100-40c".
        package var profiles: [String]
        /// By canonical PCI address.
        var functions: [String: HostFunction] = [:]

        enum CodingKeys: CodingKey {
            case id, name, datacenter, cluster, uuid, product, powerState, connectionState, cpuCores, memoryBytes, gpus
            case profiles
        }
    }

    package var about: ServiceContent.About
    package var datacenters: [Datacenter] = []
    package var clusters: [Cluster] = []
    package var hosts: [Host] = []
    package var datastores: [Datastore] = []
    package var networks: [Network] = []
}

/// A GPU of an ESXi host and what it is set up for.
package struct HostGPU: Sendable, Encodable {
    package enum Mode: String, Sendable, Encodable {
        /// A VM can have it whole.
        case passthrough
        /// NVIDIA vGPUs of several VMs.
        case vgpu
        /// Software graphics of several VMs (vSGA).
        case shared
        /// The host's own.
        case basic
    }

    /// "0000:3b:00.0", or the server's own text where that has more than one reading.
    package var address: String
    package var name: String
    package var vendor: String
    package var vendorID: UInt32
    package var deviceID: UInt32
    package var classCode: UInt32
    package var mode: Mode
    package var isPassthroughCapable: Bool
    package var memoryBytes: UInt64
    /// "sameSize" or "mixedSize", where the host says it.
    package var vgpuMode: String?
    /// Managed object ids of the VMs that use it now.
    package var virtualMachines: [String]
}

/// A PCI function of an ESXi host.
struct HostFunction: Sendable {
    var id: PciId
    var classCode: UInt32
    var name: String
    var vendor: String
}

/// 16 bits that the API sends as a signed number, in decimal.
func unsigned16(_ text: String?) -> UInt32? {
    guard let text, let number = Int32(text), (-32768...65535).contains(number) else { return nil }
    return UInt32(UInt16(truncatingIfNeeded: number))
}

extension PciId {
    /// Of a `HostPciDevice`, or a `VirtualPCIPassthroughAllowedDevice`.
    init(_ node: VIMNode) {
        self.init()
        vendor = unsigned16(node.text("vendorId")) ?? 0
        device = unsigned16(node.text("deviceId")) ?? 0
        subsystemVendor = unsigned16(node.text("subVendorId")) ?? 0
        subsystemDevice = unsigned16(node.text("subDeviceId")) ?? 0
        revision = unsigned16(node.text("revisionId")) ?? 0
    }
}

extension Infrastructure.Host {
    static let paths = [
        "name", "parent", "hardware.systemInfo.uuid", "hardware.pciDevice", "summary.config.product.fullName",
        "runtime.powerState", "runtime.connectionState", "summary.hardware.numCpuCores", "hardware.memorySize",
        "config.pciPassthruInfo", "config.graphicsInfo", "config.sharedPassthruGpuTypes",
    ]

    init(_ content: ObjectContent, datacenter: String, cluster: String) {
        id = content.object.value
        name = content.text("name") ?? ""
        self.datacenter = datacenter
        self.cluster = cluster
        uuid = content.text("hardware.systemInfo.uuid") ?? ""
        product = content.text("summary.config.product.fullName") ?? ""
        powerState = content.text("runtime.powerState") ?? ""
        connectionState = content.text("runtime.connectionState") ?? ""
        cpuCores = UInt32(clamping: content.number("summary.hardware.numCpuCores") ?? 0)
        memoryBytes = UInt64(clamping: content.number("hardware.memorySize") ?? 0)
        profiles = content.items("config.sharedPassthruGpuTypes").map(\.text)
        gpus = []
        for node in content.items("hardware.pciDevice") {
            guard let raw = node.text("id") else { continue }
            let function = HostFunction(
                id: PciId(node), classCode: unsigned16(node.text("classId")) ?? 0,
                name: node.text("deviceName") ?? "", vendor: node.text("vendorName") ?? "")
            functions[PCIText.address(raw) ?? raw] = function
        }
        var passthrough: [String: VIMNode] = [:]
        for node in content.items("config.pciPassthruInfo") {
            if let raw = node.text("id") { passthrough[PCIText.address(raw) ?? raw] = node }
        }
        var graphics: [String: VIMNode] = [:]
        for node in content.items("config.graphicsInfo") {
            if let raw = node.text("pciId") { graphics[PCIText.address(raw) ?? raw] = node }
        }
        for (address, function) in functions.sorted(by: { $0.key < $1.key }) {
            let info = graphics[address]
            // A host's boot console (ASPEED, Matrox) is a display controller as well, and no GPU anyone moves.
            guard info != nil || GPUKind(classCode: function.classCode, id: function.id) == .gpu else { continue }
            gpus.append(HostGPU(address, function, info, passthrough[address]))
        }
    }
}

extension HostGPU {
    init(_ address: String, _ function: HostFunction, _ graphics: VIMNode?, _ passthrough: VIMNode?) {
        self.address = address
        name = graphics?.text("deviceName") ?? function.name
        vendor = graphics?.text("vendorName") ?? function.vendor
        vendorID = function.id.vendor
        deviceID = function.id.device
        classCode = function.classCode
        isPassthroughCapable = passthrough?.flag("passthruCapable") ?? false
        let isPassedThrough = passthrough?.flag("passthruActive") ?? passthrough?.flag("passthruEnabled") ?? false
        mode =
            switch (isPassedThrough, graphics?.text("graphicsType")) {
            case (true, _), (_, "direct"): .passthrough
            case (_, "sharedDirect"): .vgpu
            case (_, "shared"): .shared
            default: .basic
            }
        let (bytes, overflow) = UInt64(clamping: graphics?.number("memorySizeInKB") ?? 0)
            .multipliedReportingOverflow(by: 1024)
        memoryBytes = overflow ? 0 : bytes
        vgpuMode = graphics?.text("vgpuMode")
        virtualMachines = graphics?.all("vm").map(\.text) ?? []
    }
}
