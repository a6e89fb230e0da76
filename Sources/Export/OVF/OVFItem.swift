import MigrationModel

/// One device of a VirtualHardwareSection (CIM_ResourceAllocationSettingData).
struct OVFItem {
    /// The resource types this program tells apart (CIM_ResourceAllocationSettingData.ResourceType).
    enum Kind: Int {
        case other = 1
        case processor = 3
        case memory = 4
        case ide = 5
        case scsi = 6
        case ethernet = 10
        case floppy = 14
        case cd = 15
        case dvd = 16
        case disk = 17
        case otherStorage = 20
        case serial = 21
        case usb = 23
        case graphics = 24
        case sound = 35
    }

    let element: XMLElement
    let id: String
    let type: Int
    /// Lower case.
    let subtype: String
    let name: String
    /// `vmw:Config` keys.
    let settings: [(key: String, value: String)]
    private let owner: String

    init(_ element: XMLElement, owner: String) throws {
        self.element = element
        self.owner = "\(owner): line \(element.line)"
        func text(_ name: String) -> String? {
            element.child(name, OVFNames.allocation)?.text.trimmed
        }
        guard let id = text("InstanceID") ?? text("InstanceId"), !id.isEmpty else {
            throw MigrationError(.invalidArgument, "\(self.owner): a device has no InstanceID")
        }
        guard let type = text("ResourceType").flatMap({ Int($0) }) else {
            throw MigrationError(.invalidArgument, "\(self.owner): device \(id.printable) has no usable ResourceType")
        }
        self.id = id
        self.type = type
        subtype = text("ResourceSubType")?.lowercased() ?? ""
        name = text("ElementName") ?? text("Caption") ?? "device \(id)"
        settings = element.vmwareSettings("Config")
    }

    var kind: Kind? { Kind(rawValue: type) }
    var parent: String? { self["Parent"] }
    var hostResources: [String] {
        element.children("HostResource", OVFNames.allocation).map { $0.text.trimmed }
    }
    /// Present when the VM starts.
    var automatic: Bool { self["AutomaticAllocation"]?.asFlag ?? true }

    /// Trimmed text of a child, nil when missing or empty.
    subscript(name: String) -> String? {
        let text = element.child(name, OVFNames.allocation)?.text.trimmed ?? ""
        return text.isEmpty ? nil : text
    }

    func number(_ key: String) throws -> UInt64? {
        guard let text = self[key] else { return nil }
        guard let number = UInt64(text) else {
            throw MigrationError(
                .invalidArgument, "\(owner): \(key) '\(text.printable)' of \(name.printable) is not a number")
        }
        return number
    }

    func setting(_ key: String) -> String? {
        settings.first { $0.key.lowercased() == key.lowercased() }?.value
    }
}
