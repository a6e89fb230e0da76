import FlotillaProtocol
import Passthrough

/// Groups with their functions, for people and as JSON.
struct GPUListing: Encodable {
    struct Function: Encodable {
        struct SRIOV: Encodable {
            var total: Int
            var virtualFunctions: [String]
        }
        struct Vgpu: Encodable {
            /// "mdev" or "vendor-vfio".
            var path: String
            var types: [VgpuOffer]
        }

        var address: String
        var classCode: String
        var className: String?
        var id: String
        var subsystemId: String?
        var vendor: String?
        var device: String?
        var subsystem: String?
        var revision: UInt32
        var driver: String?
        var driverOverride: String?
        var iommuGroup: Int32?
        var numaNode: Int32?
        var bridge: Bool
        var bootVga: Bool
        /// False: its configuration reads as ones.
        var answers: Bool
        var gpu: Bool
        /// Listed because it shares a group with what was asked for.
        var companions: [String]
        var bars: [BaseAddress]
        var sriov: SRIOV?
        var physicalFunction: String?
        var vgpu: Vgpu?
        var mig: String?
        var resettable: Bool
        var usedBy: [DeviceUse]
    }

    struct Group: Encodable {
        /// Nil: in no group.
        var group: Int32?
        /// Nothing outside a listed device keeps the group from going to a virtual machine.
        var functions: [Function]
    }

    var iommu: Bool
    /// Nil: a recorded tree does not tell.
    var vfioPci: Bool?
    /// The pci.ids that was read; nil when there is none.
    var namesFrom: String?
    var groups: [Group]

    /// - Parameter all: every function that could be handed over, not only GPUs.
    init(_ tree: DeviceTree, all: Bool, nameFiles: [String] = PciNames.files) {
        iommu = tree.iommu
        vfioPci = tree.vfio
        let wanted = tree.functions.filter { all ? !$0.function.bridge : $0.isGPU && !$0.function.bridge }
        let slots = Set(wanted.flatMap { tree.together(with: $0.address).map(\.address) })
        let numbers = Set(wanted.map(\.function.iommuGroup))
        let shown = tree.functions.filter {
            slots.contains($0.address) || ($0.function.iommuGroup >= 0 && numbers.contains($0.function.iommuGroup))
        }
        let names = PciNames(for: shown.map(\.wantedNames), files: nameFiles)
        namesFrom = names.file
        // In the order of their first function, which is what people look for; loose ones last.
        var order: [Int32] = []
        for function in shown where !order.contains(function.function.iommuGroup) {
            order.append(function.function.iommuGroup)
        }
        groups = (order.filter { $0 >= 0 } + order.filter { $0 < 0 }).map { number in
            Group(
                group: number < 0 ? nil : number,
                functions: shown.filter { $0.function.iommuGroup == number }.map { Function($0, names) })
        }
    }
}

extension DeviceFunction {
    fileprivate var wantedNames: PciNames.Wanted {
        PciNames.Wanted(
            vendor: function.id.vendor, device: function.id.device, subsystemVendor: function.id.subsystemVendor,
            subsystemDevice: function.id.subsystemDevice)
    }
}

extension GPUListing.Function {
    init(_ device: DeviceFunction, _ names: PciNames) {
        let function = device.function
        address = function.address
        classCode = padded(function.classCode, 4)
        className = names.className(function.classCode)
        id = function.id.text
        let subsystemID = "\(padded(function.id.subsystemVendor, 4)):\(padded(function.id.subsystemDevice, 4))"
        self.subsystemId = function.id.subsystemVendor == 0 ? nil : subsystemID
        vendor = names.vendor(function.id.vendor)
        self.device = names.device(function.id.vendor, function.id.device)
        subsystem = names.subsystem(device.wantedNames)
        revision = function.id.revision
        driver = function.driver.isEmpty ? nil : function.driver
        driverOverride = device.driverOverride.isEmpty ? nil : device.driverOverride
        iommuGroup = function.iommuGroup < 0 ? nil : function.iommuGroup
        numaNode = function.numaNode < 0 ? nil : function.numaNode
        bridge = function.bridge
        bootVga = function.bootVga
        answers = device.answers
        gpu = device.isGPU
        companions = function.companions
        bars = device.bars
        if device.totalVirtualFunctions > 0 || !device.virtualFunctions.isEmpty {
            sriov = SRIOV(
                total: device.totalVirtualFunctions, virtualFunctions: device.virtualFunctions.map(\.description))
        }
        physicalFunction = device.physicalFunction?.description
        vgpu = device.vgpuPath.map { Vgpu(path: $0, types: device.vgpuOffers) }
        mig = device.mig
        resettable = device.resettable
        usedBy = device.uses
    }
}
