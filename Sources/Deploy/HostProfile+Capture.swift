package import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
package import Passthrough
import SwiftProtobuf

/// A pool as the worker is configured with it.
package struct PoolFolder: Sendable {
    package var name: String
    /// Absolute.
    package var path: String

    package init(name: String, path: String) {
        self.name = name
        self.path = path
    }
}

/// The host as it is now. Blocks for libvirt's answers and a look at every process; writes a probe file into each
/// pool.
///
/// - Parameters:
///   - name: the worker's name.
///   - proc: where procfs is mounted.
package func hostProfile(
    name: String, connection: LibvirtConnection, pools: [PoolFolder], devices: DeviceHost = DeviceHost(),
    proc: String = "/proc"
) throws -> HostProfile {
    let sysfs = devices.sysfs
    var profile = HostProfile()
    profile.name = name
    var now = timespec()
    clock_gettime(CLOCK_REALTIME, &now)
    profile.capturedAt = Google_Protobuf_Timestamp(seconds: Int64(now.tv_sec), nanos: Int32(now.tv_nsec))
    profile.libvirtUri = connection.uri
    profile.libvirtVersion = try connection.libraryVersion()
    profile.hypervisor = try connection.hypervisor()
    profile.hypervisorVersion = try connection.hypervisorVersion()
    (profile.cpus, profile.memoryBytes) = try connection.node()
    profile.kernel = kernelRelease()
    captureDomainType(&profile, connection, proc)
    profile.networks = try connection.networks()
    profile.bridges = sysfs.list("class/net").filter { sysfs.exists("class/net/\($0)/bridge") }
    let user = connection.qemuUser()
    profile.pools = pools.map { probe($0, for: user) }
    var around = Surroundings(proc: proc, sysfs: sysfs)
    profile.pciFunctions = try pciInventory(sysfs: sysfs, holders: around.holders)
    addDetail(&profile.pciFunctions, sysfs: sysfs)
    try addVgpus(&profile.pciFunctions, of: devices.vgpus)
    profile.numaNodes = numaNodes(sysfs: sysfs)
    profile.vgpus = try devices.vgpus.records().map { record in
        .with {
            $0.function = record.function
            $0.physicalFunction = record.physical
            $0.profile = record.profile
            $0.migrationID = record.owner.migration
        }
    }
    profile.iommuEnabled = iommuEnabled(sysfs: sysfs)
    profile.vfioAvailable = vfioAvailable(sysfs: sysfs)
    around.domains = try captureDomains(&profile, connection)
    markReserved(&profile.pciFunctions, try devices.ledger.reservations())
    markUsed(&profile.pciFunctions, sysfs: sysfs, around: around)
    return profile
}

/// KVM needs the CPU's extensions as well as libvirt's word: a `/dev/kvm` without them opens, is advertised, and
/// hangs every guest.
private func captureDomainType(_ profile: inout HostProfile, _ connection: LibvirtConnection, _ proc: String) {
    guard profile.hypervisor != "TEST" else {
        // It starts nothing, so nothing has to be installed.
        (profile.domainType, profile.domainTypeReason) = ("test", "libvirt's test driver")
        (profile.efiFirmware, profile.secureBootFirmware) = (true, true)
        return
    }
    var capabilities = connection.domainCapabilities(type: "kvm")
    if !cpuHasVirtualization(proc) {
        profile.domainTypeReason = "the CPU offers no virtualization extensions (no vmx or svm in \(proc)/cpuinfo)"
    } else if case .failure(let error) = capabilities {
        profile.domainTypeReason = error.message
    }
    profile.domainType = profile.domainTypeReason.isEmpty ? "kvm" : "qemu"
    if profile.domainType == "qemu" { capabilities = connection.domainCapabilities(type: "qemu") }
    guard let document = try? capabilities.get(), let found = try? DomainCapabilities(document) else { return }
    profile.efiFirmware = found.efi
    profile.secureBootFirmware = found.secureBoot
}

func cpuHasVirtualization(_ proc: String) -> Bool {
    guard let bytes = try? Files.read("\(proc)/cpuinfo") else { return false }
    let flags = String(decoding: bytes, as: UTF8.self).split(separator: "\n").first { $0.hasPrefix("flags") }
    return flags?.split(whereSeparator: \.isWhitespace).contains { $0 == "vmx" || $0 == "svm" } ?? false
}

/// Writes, syncs and removes a file: mode bits say nothing about a read-only mount, a full disk or an NFS server.
///
/// - Parameter user: whom QEMU runs as. libvirt gives it the images, not the way to them.
private func probe(_ folder: PoolFolder, for user: (user: uid_t, group: gid_t)?) -> Pool {
    var pool = Pool()
    pool.name = folder.name
    pool.path = folder.path
    do {
        try Files.probeWriting(folder.path)
        pool.freeBytes = try Files.freeBytes(folder.path)
        if let user, let closed = folderClosed(to: user, on: folder.path) {
            pool.problem = "QEMU runs as user \(user.user) here, who can't enter \(closed)"
            return pool
        }
        pool.writable = true
    } catch {
        pool.problem = (error as? MigrationError)?.message ?? "\(error)"
    }
    return pool
}

/// Fills the domains, and marks the functions they own. A domain that is shut off still owns its devices: two
/// domains with the same GPU could not both start. Returns the domains with their disks.
private func captureDomains(
    _ profile: inout HostProfile, _ connection: LibvirtConnection
) throws -> [GPULedger.Domain] {
    var owners: [String: String] = [:]
    var found: [GPULedger.Domain] = []
    for domain in try connection.domains() {
        do {
            var summary = DomainSummary()
            summary.name = domain.name
            summary.uuid = try domain.uuid()
            summary.active = try domain.state().isActive
            summary.migrationID = try domain.migrationID() ?? ""
            profile.domains.append(summary)
            let xml = try domain.xml()
            for address in try assignedAddresses(xml, of: domain.name) { owners[address] = domain.name }
            found.append(
                GPULedger.Domain(
                    name: domain.name, migration: summary.migrationID, resources: [],
                    disks: try blockDevices(xml, of: domain.name)))
        } catch let error as MigrationError where error.code == .notFound {
            continue  // It was removed while we looked.
        }
    }
    profile.domains.sort { $0.name < $1.name }
    claim(&profile.pciFunctions, owners)
    return found
}

/// Names the owning domain instead of its process, also on functions that only share a group with what it owns.
///
/// - Parameter owners: domain names by PCI address.
func claim(_ functions: inout [PciFunction], _ owners: [String: String]) {
    var groups: [Int32: String] = [:]
    for index in functions.indices {
        guard let owner = owners[functions[index].address] else { continue }
        if !functions[index].inUseBy.isEmpty { groups[functions[index].iommuGroup] = owner }
        functions[index].inUseBy = inUseBy(domain: owner)
    }
    for index in functions.indices where functions[index].inUseBy.hasPrefix("process ") {
        if let owner = groups[functions[index].iommuGroup] { functions[index].inUseBy = inUseBy(domain: owner) }
    }
}

/// PCI addresses of a domain's hostdevs, NICs from the host and NVMe disks of libvirt's own driver included.
func assignedAddresses(_ xml: String, of name: String) throws -> [String] {
    let devices = try XMLTree.parse(xml, of: "the definition of domain \(name)").all("devices")
    // An NVMe disk can be any image of a disk's chain.
    return devices.flatMap(\.descendants)
        .filter { ["pci", "hostdev", "nvme"].contains($0.attributes["type"] ?? "") }
        .flatMap { $0.all("source", "address") }
        .compactMap { address in
            func number(_ key: String) -> UInt32? {
                address.attributes[key].flatMap { UInt32($0.hasPrefix("0x") ? String($0.dropFirst(2)) : $0, radix: 16) }
            }
            guard let bus = number("bus"), let slot = number("slot"), let function = number("function") else {
                return nil
            }
            return "\(padded(number("domain") ?? 0, 4)):\(padded(bus, 2)):\(padded(slot, 2)).\(function)"
        }
}
