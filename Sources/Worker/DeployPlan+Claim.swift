import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

/// The devices of the host that a deploy takes, from their reservation to their return. Blocking; safe to repeat after a
/// crash at any point: the ledger and the vGPUs' records know what an earlier attempt took.
extension DeployPlan {
    func owner(fence: UInt64) -> GPUOwner {
        GPUOwner(
            domain: domain.name, migration: deployment.migrationID, fence: fence, libvirt: deployment.connection.uri)
    }

    private var resources: [GPUResource] {
        domain.devices.joined().compactMap { PciAddress($0.address) }.map {
            GPUResource(function: $0, sysfs: host.sysfs)
        }
    }

    private var takesDevices: Bool { !resources.isEmpty || !vgpus.isEmpty }

    /// Reserves the devices and makes the vGPUs, all or none. The domain names them then.
    ///
    /// - Throws: `resourceExhausted` naming who has or uses one, `aborted` for a stale fence.
    mutating func claim(_ owner: GPUOwner) throws {
        guard takesDevices else { return }
        // Another's domain of this name is found before anything is taken for it.
        _ = try deployment.find(domain.name)
        do {
            try host.ledger.reserve(resources, for: owner)
            untouched = try host.ledger.reservations(of: owner.migration).filter { $0.isUntouched == true }
                .map(\.resource)
            try requireUnused()
            domain.vgpus = []
            records = []
            let others = functionsOfOthers(functions, than: domain.name, migration: owner.migration)
            for device in vgpus {
                let record = try host.vgpus.create(
                    VgpuProfile(device.vgpu.profile), for: owner, device: device.id, besides: others,
                    parameters: vgpuParameters(of: device.config))
                records.append(record)
                domain.vgpus.append(try domainVgpu(record))
            }
        } catch let error as MigrationError where error.code != .aborted {
            try giveBackUnnamed(owner)
            throw error
        }
    }

    /// Looks again for what the host itself, or another VM's process, began to use since the plan was made.
    ///
    /// - Throws: `resourceExhausted` naming it.
    func requireUnused() throws {
        var functions = domain.devices.flatMap(\.self)
        guard !functions.isEmpty else { return }
        for index in functions.indices {
            functions[index].inUseBy = ""
            functions[index].driver = host.sysfs.linkName("bus/pci/devices/\(functions[index].address)/driver") ?? ""
        }
        // While it runs its own process has them.
        let isRunning = try deployment.find(domain.name)?.state().isActive ?? false
        markUsed(
            &functions, sysfs: host.sysfs, around: Surroundings(proc: "/proc", sysfs: host.sysfs), vfio: !isRunning)
        guard let used = functions.first(where: { !$0.inUseBy.isEmpty }) else { return }
        throw MigrationError(
            .resourceExhausted, "\(used.text) came into use by \(used.inUseBy) after it was chosen",
            hint: "end that use, or name another host")
    }

    /// Throws `resourceExhausted` when what its devices pin does not fit, or there are not as many huge pages.
    func requireMemory() throws {
        guard domain.hasHostDevices || domain.options.hugepages else { return }
        try Passthrough.requireMemory(
            domain.manifest.vm.memory.bytes, onNodes: domain.memoryNodes.map(\.id),
            hugepages: domain.options.hugepages, sysfs: host.sysfs, proc: Sysfs(root: "/proc"))
    }

    private func domainVgpu(_ record: VgpuRecord) throws -> DomainVgpu {
        guard let function = functions.first(where: { $0.address == record.function }) else {
            throw MigrationError(
                .unavailable, "virtual function \(record.function) appeared only now",
                hint: "run the same command again")
        }
        return record.uuid.map { .mdev(uuid: $0, on: function) } ?? .function(function)
    }

    /// Defines the domain with what was claimed. Without it nothing stays taken.
    func define(_ owner: GPUOwner) throws -> LibvirtDomain {
        do {
            try noteDevices(of: domain.name, owner, deployment, host)
            if takesDevices { try host.ledger.handOver(to: owner) }
            let defined = try deployment.define(domain)
            Failpoint.deployDefined.hit()
            try giveBackUnnamed(owner)
            return defined
        } catch let error where (error as? MigrationError)?.code != .aborted {
            try? giveBackUnnamed(owner)
            guard isDefined, var failure = error as? MigrationError,
                case .success(nil) = Result(catching: { try deployment.find(domain.name) })
            else { throw error }
            failure.message += "; domain \(domain.name) as it was before was undefined for this one, its disks stay"
            throw failure
        }
    }

    /// Gives back what the migration holds and its domain, as it is defined now, does not name: all of it without one.
    private func giveBackUnnamed(_ owner: GPUOwner) throws {
        let held = try host.ledger.reservations(of: owner.migration).map(\.resource)
        guard try !held.isEmpty || host.vgpus.holds(owner) else { return }
        let named = try Set(deployment.resources(of: domain.name, sysfs: host.sysfs).map(\.key))
        if named.isEmpty { try host.vgpus.destroy(of: owner) }
        for record in try host.vgpus.records() where record.owner.migration == owner.migration {
            guard record.resource.map({ !named.contains($0.key) }) ?? true else { continue }
            try host.vgpus.destroy(of: owner, device: record.device)
        }
        let surplus = held.filter { !named.contains($0.key) }
        // No guest had what only this attempt took: nothing is in it. A domain of an earlier one may have had the rest.
        try host.ledger.forget(untouched.filter(surplus.contains), of: owner)
        try host.ledger.release(surplus, of: owner)
    }

    /// Takes a deploy back that did not come to its end: no domain, nothing taken; the disks stay.
    ///
    /// - Parameter ran: a guest may have used the devices.
    func rollBack(_ owner: GPUOwner, ran: Bool) throws {
        try host.requireNewest(owner)
        if ran || isDefined { try noteDevices(of: domain.name, owner, deployment, host) }
        try deployment.undefine(domain.name)
        Failpoint.deployUndefined.hit()
        guard ran || isDefined else { return try giveBackUnnamed(owner) }
        try host.giveBack(of: owner)
    }
}

/// Somebody may have given the domain another device by hand: its guest's data is in that one too.
private func noteDevices(of name: String, _ owner: GPUOwner, _ deployment: Deployment, _ host: DeviceHost) throws {
    try host.ledger.handOver(deployment.resources(of: name, sysfs: host.sysfs), to: owner)
}

/// Removes a migration's domain and gives its devices back; disks stay. What is gone already is fine. Blocking.
///
/// - Returns: functions that are not free before they were reset.
func removeDeployment(
    of owner: GPUOwner, _ configuration: WorkerConfiguration, stop: StopFlag, force: Bool
) throws -> [PciAddress] {
    let deployment = Deployment(
        connection: try LibvirtConnection(uri: configuration.libvirtURI), migrationID: owner.migration)
    let host = configuration.devices
    try host.requireNewest(owner)
    // What was plugged in while it runs is in no definition once it is off.
    try noteDevices(of: owner.domain, owner, deployment, host)
    if !force { try deployment.shutDown(owner.domain, stop: stop) }
    try noteDevices(of: owner.domain, owner, deployment, host)
    try deployment.undefine(owner.domain)
    Failpoint.deployUndefined.hit()
    return try host.giveBack(of: owner)
}
