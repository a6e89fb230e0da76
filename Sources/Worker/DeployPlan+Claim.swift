import Deploy
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

/// The devices of the host that a deploy takes, from their reservation to their return. Blocking; safe to repeat after a
/// crash at any point: the ledger and the vGPUs' records know what an earlier attempt took.
extension DeployPlan {
    func owner(fence: UInt64) -> GPUOwner {
        GPUOwner(domain: domain.name, migration: deployment.migrationID, fence: fence)
    }

    private var ledger: GPULedger { GPULedger(folder: gpuFolder) }
    private var host: VgpuHost { VgpuHost(folder: gpuFolder) }

    private var resources: [GPUResource] {
        domain.devices.joined().compactMap { PciAddress($0.address) }.map { GPUResource(function: $0, sysfs: Sysfs()) }
    }

    /// Reserves the devices and makes the vGPUs, all or none. The domain names them then.
    ///
    /// - Throws: `resourceExhausted` naming who has one, `aborted` for a stale fence.
    mutating func claim(_ owner: GPUOwner) throws {
        guard !resources.isEmpty || !vgpus.isEmpty else { return }
        do {
            try ledger.reserve(resources, for: owner)
            domain.vgpus = []
            records = []
            for device in vgpus {
                let record = try host.create(
                    VgpuProfile(device.vgpu.profile), for: owner, device: device.id,
                    parameters: vgpuParameters(of: device.config))
                records.append(record)
                domain.vgpus.append(try domainVgpu(record))
            }
        } catch let error as MigrationError where error.code != .aborted {
            try giveBackUnused(owner)
            throw error
        }
    }

    private func domainVgpu(_ record: VgpuRecord) throws -> DomainVgpu {
        if let uuid = record.uuid { return .mdev(uuid: uuid) }
        guard let function = functions.first(where: { $0.address == record.function }) else {
            throw MigrationError(
                .unavailable, "virtual function \(record.function) appeared only now",
                hint: "run the same command again")
        }
        return .function(function)
    }

    /// Gives everything back that the migration holds, unless a domain of it names them.
    func giveBackUnused(_ owner: GPUOwner) throws {
        guard try deployment.connection.domain(named: domain.name) == nil else { return }
        try host.destroy(of: owner)
        // No guest had them: nothing is in them.
        try ledger.forget(ledger.reservations(of: owner.migration).map(\.resource), of: owner)
    }

    /// Gives back what an earlier attempt took and the domain, as it is defined now, does not name.
    func giveBackSurplus(_ owner: GPUOwner) throws {
        let held = try ledger.reservations(of: owner.migration)
        guard !held.isEmpty else { return }
        for record in try host.records() where record.owner.migration == owner.migration && !owner.migration.isEmpty {
            if !records.contains(where: { $0.device == record.device }) {
                try host.destroy(of: owner, device: record.device)
            }
        }
        let kept = Set(resources)
        let surplus = try ledger.reservations(of: owner.migration).map(\.resource).filter { resource in
            guard let function = resource.function else { return false }
            return !kept.contains(resource) && !records.contains { $0.function == "\(function)" }
        }
        try ledger.release(surplus, of: owner)
    }

    /// A domain that could not start must not keep a GPU from others.
    func rollBack(_ owner: GPUOwner) throws {
        guard domain.hasHostDevices else { return }
        try deployment.undefine(domain.name)
        try host.destroy(of: owner)
        try ledger.release(of: owner)
    }
}

/// Removes a migration's domain and gives its devices back; disks stay. What is gone already is fine.
func removeDeployment(
    of name: String, migration: String, fence: UInt64, _ configuration: WorkerConfiguration
) throws {
    let deployment = Deployment(
        connection: try LibvirtConnection(uri: configuration.libvirtURI), migrationID: migration)
    try deployment.undefine(name)
    Failpoint.deployUndefined.hit()
    let owner = GPUOwner(domain: name, migration: migration, fence: fence)
    let ledger = GPULedger(folder: configuration.gpuFolder)
    guard try !ledger.reservations(of: migration).isEmpty else { return }
    try VgpuHost(folder: configuration.gpuFolder).destroy(of: owner)
    try ledger.release(of: owner)
}
