package import FlotillaProtocol
import HostKit
import MigrationModel

extension GPULedger {
    /// A libvirt domain and what its definition names.
    package struct Domain: Sendable {
        package var name: String
        /// Empty when no migration made it.
        package var migration: String
        package var resources: [GPUResource]
        /// Paths of the host's block devices that are disks of it.
        package var disks: Set<String>

        package init(name: String, migration: String, resources: [GPUResource], disks: Set<String> = []) {
            self.name = name
            self.migration = migration
            self.resources = resources
            self.disks = disks
        }
    }

    /// Makes the ledger agree with what is: libvirt's word decides over the ledger's. Call at start, before tasks run.
    ///
    /// - A device that a domain's definition names becomes that domain's, running or not.
    /// - A reservation without such a domain is given back (dirty if a domain had it), unless its migration is under way
    ///   or another process that lives took it: its domain may be about to be defined. So it is left alone when another
    ///   libvirt has its domain, and when nobody noted which one does.
    /// - What is gone from sysfs and belongs to no domain is dropped.
    ///
    /// - Parameters:
    ///   - libvirt: the URI that was asked for the domains.
    ///   - domains: all it has, also those that are shut off.
    ///   - underWay: migrations whose tasks the worker's journal still has.
    ///   - vgpus: those that flotilla made. One made by hand stays with its domain, defined or not.
    /// - Returns: what was changed or can't be right, for the log.
    @discardableResult
    package func reconcile(
        libvirt: String, domains: [Domain], underWay: Set<String>, vgpus: [VgpuRecord] = [], sysfs: Sysfs = Sysfs()
    ) throws -> [Finding] {
        let byHand = Set(vgpus.filter { $0.owner.migration.isEmpty }.compactMap { $0.resource?.key })
        return try update { book in
            var findings: [Finding] = []
            var holder: [String: Domain] = [:]
            for domain in domains {
                for resource in domain.resources {
                    if let other = holder[resource.key], other.name != domain.name {
                        findings.append(
                            .warning(
                                resource.key, "domains \(other.name) and \(domain.name) both have \(resource)",
                                remedy: "only one of them can start: take it out of the other's definition"))
                        // Keep it with whom the ledger has, so that two starts of the worker agree.
                        let known = book.entries.first { $0.resource.key == resource.key }?.owner.domain
                        guard domain.name == known else { continue }
                    }
                    holder[resource.key] = domain
                    if !resource.isPresent(in: sysfs) {
                        findings.append(
                            .warning(
                                resource.key,
                                "domain \(domain.name) has \(resource), which this host does not have now",
                                remedy: "the domain can't start until the device is back or its definition changed"))
                    }
                }
            }
            findings += book.drop(holder: holder, boot: boot, sysfs: sysfs) { entry in
                byHand.contains(entry.resource.key) || underWay.contains(entry.owner.migration)
                    || entry.keeper.map(keeper.isOther) ?? false
                    || entry.state == .reserved && entry.owner.libvirt != libvirt
            }
            findings += book.adopt(domains: domains, holder: holder, libvirt: libvirt)
            findings += book.entries.filter { entry in
                entry.state == .reserved && entry.owner.libvirt == nil && !byHand.contains(entry.resource.key)
                    && !underWay.contains(entry.owner.migration)
            }.map { entry in
                Finding.warning(
                    entry.resource.key,
                    "\(entry.resource) is reserved for \(entry.owner), which \(libvirt) does not have, and no other libvirt is "
                        + "noted for it: left alone",
                    remedy:
                        "run flotilla once with the libvirt that has it (--host); if none does, take its migration back "
                        + "(--rollback), or the entry out of \(path)")
            }
            keeper.sweep()
            return findings
        }
    }
}

extension GPULedger.Book {
    fileprivate mutating func drop(
        holder: [String: GPULedger.Domain], boot: String, sysfs: Sysfs, unless isKept: (GPUReservation) -> Bool
    ) -> [Finding] {
        let orphans = Set(entries.filter { holder[$0.resource.key] == nil && !isKept($0) }.map(\.resource.key))
        let gone = entries.filter { orphans.contains($0.resource.key) && !$0.resource.isPresent(in: sysfs) }
        entries.removeAll { entry in gone.contains { $0.resource.key == entry.resource.key } }
        let freed = entries.filter { $0.state == .reserved && orphans.contains($0.resource.key) }
        _ = release(boot: boot) { orphans.contains($0.resource.key) }
        return gone.map { entry in
            .make(
                .note, entry.resource.key, "\(entry.resource), last of \(entry.owner), is gone from this host",
                remedy: "")
        }
            + freed.map { entry in
                .make(
                    .note, entry.resource.key,
                    "\(entry.resource) was reserved for \(entry.owner), which does not have it: given back", remedy: "")
            }
    }

    fileprivate mutating func adopt(
        domains: [GPULedger.Domain], holder: [String: GPULedger.Domain], libvirt: String
    ) -> [Finding] {
        var findings: [Finding] = []
        for domain in domains {
            for resource in domain.resources where holder[resource.key]?.name == domain.name {
                let owner = GPUOwner(
                    domain: domain.name, migration: domain.migration, fence: fences[domain.migration] ?? 0,
                    libvirt: libvirt)
                let index = entries.firstIndex { $0.resource.key == resource.key }
                if let index, entries[index].state == .reserved {
                    let other = entries[index].owner.libvirt.flatMap { $0 == libvirt ? nil : $0 }
                    let isSame = entries[index].owner.isSame(as: owner)
                    // One server may have several URIs: a migration is the same behind all, a name is not.
                    if isSame && (other == nil || !owner.migration.isEmpty) {
                        entries[index].isUntouched = nil
                        entries[index].owner.libvirt = libvirt
                        continue
                    }
                    if let other {
                        findings.append(
                            .warning(
                                resource.key,
                                "\(owner) of \(libvirt) has \(resource), which \(entries[index].owner) of \(other) holds",
                                remedy: "only one of them can start: take it out of the other's definition"))
                        continue
                    }
                }
                if let index {
                    findings.append(
                        .make(
                            .note, resource.key,
                            "\(resource) belonged to \(entries[index].owner) by the ledger; \(owner) has it", remedy: ""
                        ))
                    entries.remove(at: index)
                }
                entries.append(
                    GPUReservation(
                        resource: resource, owner: owner, state: .reserved, since: Moment.now.milliseconds))
            }
        }
        return findings
    }
}

extension GPUResource {
    /// The kernel has it now.
    func isPresent(in sysfs: Sysfs) -> Bool {
        if let function { return sysfs.exists("bus/pci/devices/\(function)") }
        return sysfs.exists("bus/mdev/devices/\(mdev ?? "")")
    }
}
