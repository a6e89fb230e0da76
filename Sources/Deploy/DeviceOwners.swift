import HostKit
import MigrationModel
package import Passthrough

extension LibvirtConnection {
    /// Every domain with the PCI functions, mediated devices and block devices its definition names, running or not: two
    /// domains with the same device could not both start. Blocks.
    package func deviceOwners(sysfs: Sysfs = Sysfs()) throws -> [GPULedger.Domain] {
        try domains().compactMap { domain in
            do {
                let xml = try domain.xml()
                return GPULedger.Domain(
                    name: domain.name, migration: try domain.migrationID() ?? "",
                    resources: try assignedResources(xml, of: domain.name, sysfs: sysfs),
                    disks: try blockDevices(xml, of: domain.name))
            } catch let error as MigrationError where error.code == .notFound {
                return nil  // It was removed while we looked.
            }
        }
    }
}

extension Deployment {
    /// What this migration's domain names: in its definition, and as it runs. Empty without a domain. Blocks.
    package func resources(of name: String, sysfs: Sysfs) throws -> [GPUResource] {
        guard let domain = try find(name) else { return [] }
        let defined = try assignedResources(domain.xml(), of: name, sysfs: sysfs)
        guard try domain.state().isActive else { return defined }
        let running = try assignedResources(domain.xml(running: true), of: name, sysfs: sysfs)
        return defined + running.filter { !defined.contains($0) }
    }
}

/// PCI functions and mediated devices of a domain's hostdevs, NICs from the host included.
func assignedResources(_ xml: String, of name: String, sysfs: Sysfs) throws -> [GPUResource] {
    let functions = try assignedAddresses(xml, of: name).compactMap(PciAddress.init).map {
        GPUResource(function: $0, sysfs: sysfs)
    }
    let devices = try XMLTree.parse(xml, of: "the definition of domain \(name)").all("devices", "hostdev")
    let mediated = devices.filter { $0.attributes["type"] == "mdev" }
        .flatMap { $0.all("source", "address") }.compactMap { $0.attributes["uuid"] }
        .map { uuid in
            // A mediated device lies below its parent in /sys/devices.
            let path = sysfs.linkPath("bus/mdev/devices/\(uuid.lowercased())") ?? ""
            let parent = path.split(separator: "/").dropLast().last.flatMap { PciAddress(String($0)) }
            let physical = parent.flatMap { sysfs.linkName("bus/pci/devices/\($0)/physfn") }.flatMap(PciAddress.init)
            return GPUResource(mdev: uuid, partOf: [parent, physical].compactMap(\.self))
        }
    return functions + mediated
}

/// Paths of the host's block devices that are a domain's disks, those below them in a chain included.
func blockDevices(_ xml: String, of name: String) throws -> Set<String> {
    let disks = try XMLTree.parse(xml, of: "the definition of domain \(name)").all("devices", "disk")
    let sources = disks.flatMap(\.descendants).filter { $0.name == "source" }
    return Set(
        sources.flatMap { [$0.attributes["dev"], $0.attributes["file"]] }.compactMap(\.self).filter {
            $0.hasPrefix("/dev/")
        })
}
