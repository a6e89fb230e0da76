import FlotillaProtocol
import FoundationEssentials
import MigrationModel
import Passthrough
import SwiftProtobuf
import Synchronization
import VSphere

/// Shows an inventory as it is read.
protocol InventoryReport: Sendable {
    /// Not called for a file.
    func begin(_ infrastructure: Infrastructure) throws
    func add(_ manifest: Manifest) throws
    func finish() throws
}

/// One object, written as it grows: 5,000 manifests are never held at once.
final class JSONInventory: InventoryReport {
    private let source: String
    private let state = Mutex((isOpen: false, isEmpty: true))

    init(_ source: String) { self.source = source }

    func begin(_ infrastructure: Infrastructure) throws {
        let text = try jsonLine(infrastructure)
        try open(",\(text.dropFirst().dropLast())")
    }

    private func open(_ more: String = "") throws {
        guard !state.withLock({ $0.isOpen }) else { return }
        Console.out("{\"source\":\(try jsonLine(source))\(more),\"vms\":[\n")
        state.withLock { $0.isOpen = true }
    }

    func add(_ manifest: Manifest) throws {
        try open()
        let text = try manifest.jsonString()
        let isFirst = state.withLock { state in
            defer { state.isEmpty = false }
            return state.isEmpty
        }
        Console.out((isFirst ? "" : ",\n") + text)
    }

    func finish() throws {
        try open()
        Console.line("\n]}")
    }
}

/// Tables for people, in alphabetical order.
final class InventoryTables: InventoryReport {
    private struct State {
        var infrastructure: Infrastructure?
        var rows: [Row] = []
    }

    private struct Row {
        var cells: [String]
        var id: String
        var datacenter: String
    }

    private let state = Mutex(State())

    func begin(_ infrastructure: Infrastructure) { state.withLock { $0.infrastructure = infrastructure } }

    func add(_ manifest: Manifest) {
        let vm = manifest.vm
        let size = manifest.disks.reduce(0) { $0 &+ $1.capacityBytes }
        let blocked = manifest.findings.filter { $0.severity == .blocked }.count
        let isTemplate = manifest.findings.contains { $0.severity == .note && $0.message == "it is a template" }
        let cells = [
            vm.name, isTemplate ? "template" : Self.text(of: vm.powerState), "\(vm.cpu.count)",
            byteText(vm.memory.bytes),
            "\(manifest.disks.count) (\(byteText(size)))", Self.list(manifest.nics.map(\.network)),
            Self.list(manifest.gpus.map(Self.text)), Self.list(manifest.otherDevices.map(Self.text)),
            vm.guestFullName.isEmpty ? vm.guestID : vm.guestFullName,
            blocked == 0 ? "-" : "\(blocked) blocked",
        ]
        let (id, datacenter) = (manifest.source.vmMoid, manifest.source.datacenter)
        state.withLock { $0.rows.append(Row(cells: cells, id: id, datacenter: datacenter)) }
    }

    func finish() {
        let state = state.withLock { $0 }
        if let found = state.infrastructure {
            Console.line(found.about.product)
            // Names repeat between data centres.
            let several = found.datacenters.count > 1
            func placed(_ title: String, _ head: [String], _ rows: [(cells: [String], datacenter: String)]) {
                guard several else { return section(title, head, rows.map(\.cells)) }
                section(title, head + ["data centre"], rows.map { $0.cells + [$0.datacenter] })
            }
            placed(
                "clusters", ["cluster", "hosts"],
                found.clusters.map { cluster in
                    let hosts = found.hosts.count(where: {
                        $0.cluster == cluster.name && $0.datacenter == cluster.datacenter
                    })
                    return ([cluster.name, "\(hosts)"], cluster.datacenter)
                })
            placed(
                "hosts", ["host", "cluster", "state", "cores", "memory", "GPUs"],
                found.hosts.map { (row($0), $0.datacenter) })
            let gpus = found.hosts.flatMap { host in host.gpus.map { row(host, $0) } }
            section("GPUs", ["host", "address", "GPU", "mode", "memory", "VMs"], gpus)
            placed(
                "datastores", ["datastore", "type", "size", "free"],
                found.datastores.map {
                    ([$0.name, $0.kind, byteText($0.capacityBytes), byteText($0.freeBytes)], $0.datacenter)
                })
            placed(
                "networks", ["network", "port group"],
                found.networks.map { ([$0.name, $0.key ?? "-"], $0.datacenter) })
        }
        let hasIDs = state.rows.contains { !$0.id.isEmpty }
        let several = Set(state.rows.map(\.datacenter).filter { !$0.isEmpty }).count > 1
        func placed(_ cells: [String], _ id: String, _ datacenter: String) -> [String] {
            var cells = cells
            if several { cells.insert(datacenter, at: 1) }
            if hasIDs { cells.insert(id, at: 1) }
            return cells
        }
        let head = ["vm", "power", "cpus", "memory", "disks", "networks", "GPUs", "other devices", "guest", "findings"]
        section(
            "VMs", placed(head, "id", "data centre"),
            state.rows.sorted { ($0.cells[0], $0.id) < ($1.cells[0], $1.id) }
                .map { placed($0.cells, $0.id, $0.datacenter) })
    }

    private func section(_ title: String, _ head: [String], _ rows: [[String]]) {
        Console.line("\n\(title) (\(rows.count))")
        guard !rows.isEmpty else { return }
        for line in table(head, rows) { Console.line(line.withoutControls) }
    }

    private func row(_ host: Infrastructure.Host) -> [String] {
        [
            host.name, host.cluster.isEmpty ? "-" : host.cluster, host.connectionState, "\(host.cpuCores)",
            byteText(host.memoryBytes), "\(host.gpus.count)",
        ]
    }

    private func row(_ host: Infrastructure.Host, _ gpu: HostGPU) -> [String] {
        [
            host.name, gpu.address, gpu.name, gpu.mode.rawValue,
            gpu.memoryBytes > 0 ? byteText(gpu.memoryBytes) : "-", "\(gpu.virtualMachines.count)",
        ]
    }

    private static func list(_ texts: [String]) -> String { texts.isEmpty ? "-" : listed(texts) }

    private static func text(of state: PowerState) -> String {
        switch state {
        case .poweredOn: "on"
        case .poweredOff: "off"
        case .suspended: "suspended"
        default: "unknown"
        }
    }

    private static func text(_ gpu: AssignedDevice) -> String {
        switch gpu.backing {
        case .vgpu(let backing): "vGPU \(backing.profile)"
        case .dvx(let backing): "DVX \(backing.deviceClass)"
        case .dynamic(let backing):
            "dynamic \(backing.customLabel.isEmpty ? gpu.idTexts.joined(separator: "|") : backing.customLabel)"
        default: gpu.name.isEmpty ? gpu.idTexts.joined(separator: "|") : gpu.name
        }
    }
}
