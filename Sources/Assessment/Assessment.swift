package import FlotillaProtocol
import Passthrough

/// Whether and how VMs can be moved, judged by what migrations judge: captures' findings and preflight.
package struct Assessment: Sendable, Encodable {
    package enum Verdict: String, Sendable, Encodable, CaseIterable, Comparable {
        case ready, warning, blocked

        package static func < (a: Verdict, b: Verdict) -> Bool {
            (allCases.firstIndex(of: a) ?? 0) < (allCases.firstIndex(of: b) ?? 0)
        }
    }

    package struct Reason: Sendable, Encodable, Equatable {
        package var severity: Verdict
        package var subject: String
        package var message: String
        package var remedy: String

        package init(_ finding: Finding) {
            severity = finding.severity == .blocked ? .blocked : finding.severity == .warning ? .warning : .ready
            subject = finding.subject
            message = finding.message
            remedy = finding.remedy
        }
    }

    /// A device of the VM that isn't emulated.
    package struct Device: Sendable, Encodable {
        package var id: String
        package var isGPU: Bool
        /// "10de:20b5", "grid_a100-40c", "DVX …".
        package var kind: String
        package var name: String
        /// What `--gpu-map` makes of it, where that is something else.
        package var becomes: String?

        /// "10de:20b5", "10de:20b5 as A100-40C".
        package var kindText: String { kind + (becomes.map { " as \($0)" } ?? "") }

        /// Where it would fit, by host: the addresses of the functions that would be handed over.
        package var fits: [Fit]
    }

    package struct Fit: Sendable, Encodable {
        package var host: String
        package var functions: [String]
    }

    package struct VM: Sendable, Encodable {
        /// Of a vSphere VM: its managed object id, and where it is.
        package var id = ""
        package var name: String
        package var source: String
        package var datacenter = ""
        package var folder = ""
        package var sourceHost = ""
        package var verdict: Verdict
        package var cpus: UInt32
        package var memoryBytes: UInt64
        package var diskBytes: [UInt64]
        package var firmware: String
        package var guest: String
        package var power: String
        package var networks: [String]
        package var devices: [Device]
        package var reasons: [Reason]
        /// Hosts on which nothing blocks it.
        package var hosts: [String]
    }

    package struct Summary: Sendable, Encodable {
        package var ready = 0
        package var warning = 0
        package var blocked = 0
        package var diskBytes: UInt64 = 0
        package var memoryBytes: UInt64 = 0
        package var gpus = 0
    }

    /// How many GPUs of a kind the VMs are to get, and how many of it the hosts have that nothing uses.
    package struct Demand: Sendable, Encodable {
        package var kind: String
        package var wanted: Int
        package var free: Int
    }

    package private(set) var summary = Summary()
    package private(set) var demand: [Demand] = []
    package private(set) var hosts: [String]
    package private(set) var vms: [VM] = []

    private let profiles: [HostProfile]
    /// The same, less what the VMs that were added so far will have of their devices.
    private var left: [HostProfile]
    /// What the VMs that were added so far are called and known by on each of them.
    private var names: [Set<String>]
    private var uuids: [Set<String>]
    private let options: DeployOptions
    private let pool: String?
    private let format: String

    private enum CodingKeys: String, CodingKey { case summary, demand, hosts, vms }

    /// - Parameter pool: the pool's name on each host; nil for each host's largest.
    package init(hosts: [HostProfile], options: DeployOptions, pool: String?, format: String) {
        (profiles, left) = (hosts, hosts)
        names = hosts.map { _ in [] }
        uuids = names
        self.hosts = hosts.map(\.name)
        self.options = options
        self.pool = pool
        self.format = format
    }

    package mutating func add(_ manifest: Manifest, source: String) {
        var options = options
        options.domainName = ""
        var findings = manifest.findings + sourceFindings(manifest)
        var possible: [String] = []
        var best: [Finding]?
        for host in profiles {
            let pool = poolName(on: host)
            let judged = preflight(
                manifest: manifest, options: options, pool: pool, diskFormat: format, host: host)
            if !judged.contains(where: { $0.severity == .blocked }) { possible.append(host.name) }
            // The host that is nearest to taking it says what is left to do.
            if Self.weight(judged) < best.map(Self.weight) ?? .max { best = judged }
        }
        findings += best ?? hostlessFindings(manifest: manifest, options: options)
        findings += shortage(manifest, options, on: possible)
        let reasons = Self.distinct(findings)
        add(
            VM(
                id: manifest.source.vmMoid, name: manifest.vm.name, source: source,
                datacenter: manifest.source.datacenter, folder: manifest.vm.folder,
                sourceHost: manifest.source.hostName, verdict: reasons.map(\.severity).max() ?? .ready,
                cpus: manifest.vm.cpu.count, memoryBytes: manifest.vm.memory.bytes,
                diskBytes: manifest.disks.map(\.capacityBytes), firmware: manifest.vm.firmware == .efi ? "EFI" : "BIOS",
                guest: manifest.vm.guestFullName.isEmpty ? manifest.vm.guestID : manifest.vm.guestFullName,
                power: manifest.vm.powerState.word, networks: manifest.nics.map(\.network),
                devices: devices(manifest), reasons: reasons, hosts: possible))
        for device in manifest.gpus { count(target(device)) }
    }

    package var isOfSeveralDatacenters: Bool { Set(vms.map(\.datacenter).filter { !$0.isEmpty }).count > 1 }

    private func target(_ device: AssignedDevice) -> AssignedDevice { mapped(device, by: options.gpuMappings) }

    private func poolName(on host: HostProfile) -> String {
        pool ?? host.pools.filter(\.writable).max { $0.freeBytes < $1.freeBytes }?.name ?? ""
    }

    /// Gives the VM its name, room and devices on one of these hosts. What each VM alone could have may not be enough
    /// for all.
    private mutating func shortage(
        _ manifest: Manifest, _ options: DeployOptions, on possible: [String]
    ) -> [Finding] {
        guard !possible.isEmpty else { return [] }
        var kept = manifest
        // VMs of one assessment are told apart by name; none has a migration yet.
        kept.migrationID = ""
        let (name, uuid) = (options.domainName(for: kept.vm), kept.vm.biosUuid.lowercased())
        let needed = bytesNeeded(kept.disks, format: format, isStaged: kept.keepsSourceFiles).expected
        var lacks: Finding?
        var lacksDevices = false
        for index in left.indices where possible.contains(left[index].name) {
            let poolName = poolName(on: profiles[index])
            let place = left[index].pools.firstIndex { $0.name == poolName }
            if names[index].contains(name) {
                lacks = .warning(
                    "vm", "a VM before this one becomes the domain \(name) as well",
                    remedy: "migrate one of them by itself with --name, or to another host")
            } else if !uuid.isEmpty, uuids[index].contains(uuid) {
                lacks = .warning(
                    "vm", "a VM before this one has the same BIOS UUID, \(uuid)",
                    remedy: "migrate one of them with --new-uuid, or to another host")
            } else if let place, left[index].pools[place].freeBytes < needed {
                lacks = .warning(
                    "pool \(poolName)", "the VMs before this one take the room that the hosts have for disks",
                    remedy: "add room to pool \(poolName), or move it to another host")
            } else if left[index].take(kept, options) {
                names[index].insert(name)
                uuids[index].insert(uuid)
                if let place { left[index].pools[place].freeBytes -= needed }
                return []
            } else {
                lacksDevices = true
            }
        }
        if let lacks, !lacksDevices { return [lacks] }
        let kinds = Set((manifest.gpus + manifest.otherDevices).map { target($0).kindText }).sorted().joined(
            separator: ", ")
        return [
            .warning(
                "gpus", "the VMs before this one take all that the hosts have of \(kinds)",
                remedy: "move it after one of them has gone elsewhere, or add a host with more of them")
        ]
    }

    /// A source that can't be captured at all.
    package mutating func add(unreadable source: String, message: String, remedy: String) {
        add(
            VM(
                name: source, source: source, verdict: .blocked, cpus: 0, memoryBytes: 0, diskBytes: [], firmware: "",
                guest: "", power: "", networks: [], devices: [],
                reasons: [Reason(.blocked("source", message, remedy: remedy))], hosts: []))
    }

    private mutating func add(_ vm: VM) {
        switch vm.verdict {
        case .ready: summary.ready += 1
        case .warning: summary.warning += 1
        case .blocked: summary.blocked += 1
        }
        for bytes in vm.diskBytes { summary.diskBytes = summary.diskBytes &+ bytes }
        summary.memoryBytes = summary.memoryBytes &+ vm.memoryBytes
        summary.gpus += vm.devices.count(where: \.isGPU)
        vms.append(vm)
    }

    private static func weight(_ findings: [Finding]) -> Int {
        findings.reduce(0) { $0 + ($1.severity == .blocked ? 1000 : 1) }
    }

    /// Worst first, each once.
    private static func distinct(_ findings: [Finding]) -> [Reason] {
        var seen: Set<String> = []
        let reasons = findings.filter { seen.insert("\($0.subject) \($0.message)").inserted }.map(Reason.init)
        // Preflight speaks of the TPM's new state as captures do.
        let tpm = reasons.indices.filter { reasons[$0].subject == "vm" && reasons[$0].message.contains("TPM") }
            .dropFirst()
        return reasons.indices.filter { !tpm.contains($0) }.map { reasons[$0] }.enumerated()
            .sorted { ($1.element.severity, $0.offset) < ($0.element.severity, $1.offset) }.map(\.element)
    }

    private func devices(_ manifest: Manifest) -> [Device] {
        let all = manifest.gpus + manifest.otherDevices
        guard !all.isEmpty else { return [] }
        let wanted = wantedDevices(manifest, options.gpuMappings)
        let matches = profiles.map { ($0.name, matchDevices(wanted, on: $0)) }
        return all.enumerated().map { index, device in
            let target = target(device)
            return Device(
                id: device.id, isGPU: index < manifest.gpus.count, kind: device.kindText, name: device.name,
                becomes: target == device ? nil : target.kindText,
                fits: matches.compactMap { host, match in
                    guard let entry = match.entries.first(where: { $0.device.id == device.id }),
                        !entry.functions.isEmpty
                    else { return nil }
                    return Fit(host: host, functions: entry.functions.map(\.address))
                })
        }
    }

    private mutating func count(_ device: AssignedDevice) {
        let kind = device.kindText
        if let known = demand.firstIndex(where: { $0.kind == kind }) {
            demand[known].wanted += 1
            return
        }
        let free: Int
        if case .vgpu(let vgpu) = device.backing {
            free = profiles.reduce(0) { $0 + Int($1.room(for: VgpuProfile(vgpu.profile))) }
        } else {
            free = room(for: device)
        }
        demand.append(Demand(kind: kind, wanted: 1, free: free))
    }

    /// How many VMs with nothing but this device the hosts could serve, one after the other: of an IOMMU group only one.
    private func room(for device: AssignedDevice) -> Int {
        var (vm, options) = (Manifest(), DeployOptions())
        vm.gpus = [device]
        options.gpu = .gpuRequire
        return profiles.reduce(0) { sum, host in
            var (left, count) = (host, 0)
            while left.take(vm, options) { count += 1 }
            return sum + count
        }
    }
}

extension AssignedDevice {
    /// What a target must have for it.
    var kindText: String {
        switch backing {
        case .vgpu(let vgpu): vgpu.profile
        case .dvx(let dvx): "DVX \(dvx.deviceClass)"
        case .sriov(let function): "SR-IOV \(function.id.text)"
        case .passthrough, .dynamic:
            allowedIDs.isEmpty ? "unknown" : idTexts.joined(separator: " or ")
        case nil: "unknown"
        }
    }
}

extension PowerState {
    fileprivate var word: String {
        switch self {
        case .poweredOff: "off"
        case .poweredOn: "on"
        case .suspended: "suspended"
        default: ""
        }
    }
}
