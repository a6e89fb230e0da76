package import FlotillaProtocol
import MigrationModel

/// What a host can hand over for the devices a VM had.
package struct DeviceMatch: Sendable {
    package struct Entry: Sendable {
        package var device: AssignedDevice
        /// Every function to hand over for it: the whole slot and its companions, in address order. Empty when
        /// blocked. Two entries of one source slot (GPU and its audio) share the same functions.
        package var functions: [PciFunction]
        /// Why it can't be served; empty when it is.
        package var findings: [Finding]
    }

    /// One per wanted device, in the order asked.
    package var entries: [Entry]

    package var findings: [Finding] { entries.flatMap(\.findings) }
    /// The vGPUs to make.
    package var vgpus: [AssignedDevice] {
        entries.map(\.device).filter { if case .vgpu = $0.backing { true } else { false } }
    }
    package var isComplete: Bool { entries.allSatisfy { $0.findings.isEmpty } }

    /// The devices to hand over, each a list of functions that stay together. None twice.
    package var devices: [[PciFunction]] {
        var seen: Set<String> = []
        return entries.compactMap { entry in
            guard let first = entry.functions.first, seen.insert(first.address).inserted else { return nil }
            return entry.functions
        }
    }
}

/// What `PciFunction.inUseBy` holds for a function that a libvirt domain owns.
package func inUseBy(domain name: String) -> String { "domain \(name)" }

/// Functions that another domain's definition names, running or not: a vGPU on one would go to two.
///
/// - Parameter migration: whose reservations are the domain's own.
package func functionsOfOthers(
    _ functions: [PciFunction], than domain: String, migration: String
) -> Set<PciAddress> {
    let others = functions.filter { function in
        function.inUseBy.hasPrefix(inUseBy(domain: "")) && function.inUseBy != inUseBy(domain: domain)
            && (migration.isEmpty || !function.inUseBy.contains("(migration \(migration))"))
    }
    return Set(others.compactMap { PciAddress($0.address) })
}

/// The same by what libvirt says, for a vGPU that a person makes.
///
/// - Throws: `failedPrecondition` when `gpu`, which is to hold it, is one.
package func functionsOfOthers(
    _ domains: [GPULedger.Domain], than own: String, on gpu: PciAddress?
) throws -> Set<PciAddress> {
    let others = domains.filter { $0.name != own }
    if let gpu, let holder = others.first(where: { $0.resources.contains { $0.function == gpu } }) {
        throw MigrationError(
            .failedPrecondition, "\(gpu) is in use by domain \(holder.name)",
            hint: "undeploy that domain, or take the device out of its definition")
    }
    return Set(others.flatMap(\.resources).compactMap(\.function))
}

/// Marks what the ledger has for somebody: reserved while no domain names it yet, or not reset since one had it. Without
/// this a device would be chosen that can't be had, although the host has another.
package func markReserved(_ functions: inout [PciFunction], _ reservations: [GPUReservation]) {
    for index in functions.indices {
        let (key, use) = ("pci:\(functions[index].address)", functions[index].inUseBy)
        // Its virtual functions are no owner of it.
        guard use.isEmpty || use.hasPrefix("its ") else { continue }
        if let entry = reservations.first(where: { $0.resource.key == key }) {
            functions[index].inUseBy =
                entry.state == .dirty ? "what \(entry.owner) left in it (not reset since)" : "\(entry.owner)"
        } else if use.isEmpty, let part = reservations.first(where: { $0.resource.parents.contains(key) }) {
            functions[index].inUseBy = "a vGPU of \(part.owner)"
        }
    }
}

/// Finds a device of the host for each wanted one, or says why there is none. Pure: judges the profile as it was
/// captured; binding may still fail when the host changed since.
///
/// Vendor and device id must be equal. An equal subsystem id is preferred, not required: the same chip on another
/// vendor's board takes the same driver. A device of several wanted functions of one source slot is matched as one.
///
/// - Parameter domain: the domain being deployed; devices it already holds count as free and are preferred, so that
///   a repeated deploy picks the same.
/// - Parameter migration: whose vGPUs and reservations count as the domain's own.
package func matchDevices(
    _ wanted: [AssignedDevice], on host: HostProfile, for domain: String = "", migration: String = ""
) -> DeviceMatch {
    guard !wanted.isEmpty else { return DeviceMatch(entries: []) }
    let requests = DeviceRequest.group(wanted)
    let inventory = HostDevices(host, domain: domain, migration: migration)
    var entries = wanted.map { DeviceMatch.Entry(device: $0, functions: [], findings: []) }

    let candidates = requests.map { inventory.candidates(for: $0) }
    let servable = requests.indices.map { index in
        requests[index].unsupported.isEmpty && inventory.hostProblem == nil
            ? candidates[index].filter { requests[index].unaskedGPU(in: $0.functions) == nil } : []
    }
    // A group shared only with other devices of this VM is fine, so judge sharing against all that may go with it.
    let together = Set(servable.joined().flatMap(\.addresses))
    let usable = servable.map { list in
        let possible = list.filter {
            inventory.problems($0).isEmpty && inventory.unrelated($0, besides: together).isEmpty
        }
        let alone = possible.filter { inventory.unrelated($0, besides: []).isEmpty }
        return alone + possible.filter { unit in !alone.contains { $0.key == unit.key } }
    }
    var chosen = assign(usable)
    var taken = Set(chosen.values.flatMap(\.addresses))
    while let index = chosen.keys.sorted().first(where: { index in
        chosen[index].map { !inventory.unrelated($0, besides: taken).isEmpty } ?? false
    }) {
        taken.subtract(chosen.removeValue(forKey: index)?.addresses ?? [])
    }

    for (index, request) in requests.enumerated() {
        for member in request.members {
            if let unit = chosen[index] {
                entries[member].functions = unit.functions
            } else {
                entries[member].findings = inventory.explain(
                    wanted[member], request, candidates[index], taken: taken, wantedAlike: requests)
            }
        }
    }
    let vgpus = wanted.indices.filter { if case .vgpu = wanted[$0].backing { true } else { false } }
    for (index, findings) in zip(vgpus, vgpuFindings(vgpus.map { wanted[$0] }, on: host, taken: taken, for: migration))
    {
        entries[index].findings = unsupportedBacking(wanted[index]).map { [$0] } ?? findings
    }
    return DeviceMatch(entries: entries)
}

/// Maximum bipartite matching by augmenting paths, so that a device with a choice makes room for one without.
/// Requests and candidates keep their order of preference.
private func assign(_ usable: [[HostDevice]]) -> [Int: HostDevice] {
    var owner: [String: Int] = [:]
    var result: [Int: HostDevice] = [:]
    func place(_ request: Int, _ visited: inout Set<String>) -> Bool {
        for unit in usable[request] where visited.insert(unit.key).inserted {
            if let other = owner[unit.key], !place(other, &visited) { continue }
            owner[unit.key] = request
            result[request] = unit
            return true
        }
        return false
    }
    for request in usable.indices {
        var visited: Set<String> = []
        _ = place(request, &visited)
    }
    return result
}
