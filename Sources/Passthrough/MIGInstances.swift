import FlotillaProtocol
import HostKit
import MigrationModel

/// GPU instances of one GPU in MIG mode, by nvidia-smi.
struct MIGInstances {
    let tools: VgpuTools
    let gpu: PciAddress

    private var hint: String { "it has to be in MIG mode: " + enableMIGHint("\(gpu)") }

    func layout() throws -> Mig {
        let tables = try tools.migTables(of: ["-i", "\(gpu)"], hint: hint)
        return Mig(
            profiles: tables.profiles, placements: tables.placements, instances: tables.instances,
            vgpus: tools.supportedTypes(of: gpu))
    }

    /// Those there are: none out of MIG mode.
    func all() throws -> [MigInstance] {
        try Mig(profiles: "", placements: "", instances: list("-lgi")).instances
    }

    private func list(_ flag: String) throws -> String { try tools.migTable(flag, of: ["-i", "\(gpu)"], hint: hint) }

    /// Why its instances must stay as they are; nil when nothing uses them.
    func obstacleToMoving() throws -> String? {
        let processes = try tools.run(
            "nvidia-smi", ["-i", "\(gpu)", "--query-compute-apps=pid", "--format=csv,noheader"], hint: hint)
        let ids = processes.split { !$0.isNumber }
        if !ids.isEmpty { return "processes use it (\(ids.prefix(8).joined(separator: ", ")))" }
        // "1c.3g.20gb": such can't be made again as they were.
        let divided = try list("-lci").split(separator: "\n").contains { line in
            let words = line.split { $0.isWhitespace || $0 == "|" }
            return words.contains { $0.contains("c.") && $0.contains("g.") && $0.hasSuffix("gb") }
        }
        return divided ? "its instances are divided into compute instances" : nil
    }

    /// - Parameter places: nil where the driver is to choose.
    func creating(_ wanted: [(profile: MigProfile, start: UInt32?)]) -> [String] {
        let tuples = wanted.map { $0.profile.id + ($0.start.map { ":\($0)" } ?? "") }
        return ["nvidia-smi", "mig", "-i", "\(gpu)", "-cgi", tuples.joined(separator: ","), "-C"]
    }

    func destroying(_ instance: String) -> [[String]] {
        ["-dci", "-dgi"].map { ["nvidia-smi", "mig", "-i", "\(gpu)", "-gi", instance, $0] }
    }

    func create(_ wanted: [(profile: MigProfile, start: UInt32?)]) throws { try run(creating(wanted)) }

    /// At its places; by a version of nvidia-smi that can't say where, in this order.
    func create(_ wanted: [MigInstance], by layout: Mig) throws {
        let profiles = wanted.map { layout.profile($0.name) ?? MigProfile() }
        do { try create(zip(profiles, wanted).map { ($0, $1.start) }) } catch {
            let before = Set(layout.instances.map(\.id))
            try destroy(all().filter { !before.contains($0.id) })
            try create(profiles.map { ($0, nil) })
        }
    }

    /// - Throws: at the first that can't be: something uses it.
    func destroy(_ instances: [MigInstance]) throws {
        for instance in instances {
            let commands = destroying(instance.id)
            // One without compute instances has none to destroy, and says so.
            _ = try? run(commands[0])
            try run(commands[1])
        }
        guard !instances.isEmpty, let left = try all().first(where: { one in instances.contains { $0.id == one.id } })
        else { return }
        throw MigrationError(
            .internal,
            "the GPU instance \(left.name) (\(left.id)) of \(gpu) is still there, although nvidia-smi destroyed it",
            hint: "end what uses it, and try again")
    }

    private func run(_ command: [String]) throws {
        Failpoint.gpuMigStep.hit()
        try tools.run(command[0], Array(command.dropFirst()), hint: hint)
    }
}

extension VgpuTools {
    /// - Parameter selection: "-i" and an address; empty for all GPUs in MIG mode.
    func migTables(
        of selection: [String], hint: String
    ) throws -> (profiles: String, placements: String, instances: String) {
        let profiles = try run("nvidia-smi", ["mig"] + selection + ["-lgip"], hint: hint)
        // Older versions don't tell places.
        let placements = (try? run("nvidia-smi", ["mig"] + selection + ["-lgipp"], hint: hint)) ?? ""
        return (profiles, placements, try migTable("-lgi", of: selection, hint: hint))
    }

    /// Empty where nvidia-smi says, with an error, that there is nothing to list. Without one it draws a table.
    func migTable(_ flag: String, of selection: [String], hint: String) throws -> String {
        func isNothing(_ text: String) -> Bool {
            let words = text.lowercased()
            return words.contains("instances found") || words.contains("no mig-enabled device")
        }
        do {
            let table = try run("nvidia-smi", ["mig"] + selection + [flag], hint: hint)
            guard table.contains("|") || isNothing(table) else {
                throw MigrationError(
                    .internal, "nvidia-smi mig \(flag) lists nothing that can be read: \(table.prefix(300))", hint: hint
                )
            }
            return table
        } catch let error as MigrationError {
            guard isNothing(error.message) else { throw error }
            return ""
        }
    }
}
