/// Namespaces of OVF 1.x and 2.x (DSP0243) and of VMware's and DMTF's vocabularies in it.
enum OVFNames {
    static let envelope: Set<String> = [
        "http://schemas.dmtf.org/ovf/envelope/1", "http://schemas.dmtf.org/ovf/envelope/2",
    ]
    private static let schema = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/"
    /// Item, StorageItem and EthernetPortItem describe a device with the same element names.
    static let allocation: Set<String> = [
        schema + "CIM_ResourceAllocationSettingData", schema + "CIM_StorageAllocationSettingData",
        schema + "CIM_EthernetPortAllocationSettingData", schema + "CIM_StorageAllocationSettingData.xsd",
        schema + "CIM_EthernetPortAllocationSettingData.xsd",
    ]
    static let system: Set<String> = [schema + "CIM_VirtualSystemSettingData"]
    static let vmware: Set<String> = ["http://www.vmware.com/schema/ovf"]
}

extension XMLElement {
    func ovf(_ name: String) -> XMLElement? { child(name, OVFNames.envelope) }
    func ovfAll(_ name: String) -> [XMLElement] { children(name, OVFNames.envelope) }
    func ovfAttribute(_ name: String) -> String? { attribute(name, OVFNames.envelope) }

    /// `vmw:Config` or `vmw:ExtraConfig` children as key and value, in order.
    func vmwareSettings(_ name: String) -> [(key: String, value: String)] {
        children(name, OVFNames.vmware).compactMap { element in
            guard let key = element.attribute("key", OVFNames.vmware) else { return nil }
            return (key, element.attribute("value", OVFNames.vmware) ?? element.text)
        }
    }
}
