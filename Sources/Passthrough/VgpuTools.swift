import FlotillaProtocol
import HostKit
import MigrationModel

/// The vendor's and mdevctl's programs. Tests name a folder with stand-ins.
package struct VgpuTools: Sendable {
    package var folders: [String]

    package init(folders: [String] = ["/usr/lib/nvidia", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]) {
        self.folders = folders
    }

    func find(_ name: String) -> String? { Program.find(name, in: folders) }

    /// - Throws: `failedPrecondition` without the program, `internal` with its words when it fails.
    @discardableResult
    func run(_ name: String, _ arguments: [String], hint: String) throws -> String {
        guard let program = find(name) else {
            throw MigrationError(
                .failedPrecondition, "\(name) is in none of \(folders.joined(separator: ", "))", hint: hint)
        }
        let outcome = try Program.run(program, arguments, limit: .seconds(120))
        guard outcome.status == 0 else {
            throw MigrationError(
                .internal, "\(name) \(arguments.joined(separator: " ")): \(outcome.output.prefix(1000))", hint: hint)
        }
        return outcome.output
    }
}

/// GPU instances of one GPU, by nvidia-smi.
struct MIGInstances {
    struct Instance: Equatable {
        var name: String
        var id: String
    }

    let tools: VgpuTools
    let gpu: PciAddress
    private let hint = "enable MIG on it first: nvidia-smi -i <address> -mig 1"

    /// Profile ids by name ("1g.5gb"): they differ between models.
    func profiles() throws -> [String: String] {
        let output = try tools.run("nvidia-smi", ["mig", "-i", "\(gpu)", "-lgip"], hint: hint)
        return Dictionary(migRows(output).map { ($0[0], $0[1]) }) { first, _ in first }
    }

    func instances() throws -> [Instance] {
        // It exits with an error when there is none.
        guard let output = try? tools.run("nvidia-smi", ["mig", "-i", "\(gpu)", "-lgi"], hint: hint) else { return [] }
        return migRows(output).filter { $0.count > 2 }.map { Instance(name: $0[0], id: $0[2]) }
    }

    /// Makes an instance of this name beside those there are. Where an instance lies depends on the order in which they were
    /// made, so when there is no room and nothing uses the GPU, all are made again in other orders until one has room.
    ///
    /// - Parameter mayRearrange: no vGPU lives on the GPU.
    /// - Throws: `resourceExhausted`; the instances are as they were.
    func add(_ name: String, mayRearrange: Bool) throws {
        let ids = try profiles()
        let id = try id(of: name, among: ids)
        do { return try create([id]) } catch {
            let full = MigrationError(
                .resourceExhausted, "\(gpu) has no room for a GPU instance \(name): \(error)",
                hint: "destroy vGPUs on it, or choose another GPU")
            let before = try instances()
            guard mayRearrange, !before.isEmpty, before.count < 7 else { throw full }
            try clear()
            for order in orderings(before.map(\.name) + [name]) where order != before.map(\.name) + [name] {
                do { return try create(order.compactMap { ids[$0] }) } catch { try clear() }
            }
            try create(before.compactMap { ids[$0.name] })
            throw full
        }
    }

    /// What `add` does where there is room.
    func adding(_ name: String) throws -> HostStep { .run(creation(of: [try id(of: name, among: profiles())])) }

    private func id(of name: String, among ids: [String: String]) throws -> String {
        guard let id = ids[name] else {
            throw MigrationError(
                .failedPrecondition, "\(gpu) has no GPU instance profile \(name)",
                hint: "it has \(ids.keys.sorted().joined(separator: ", "))")
        }
        return id
    }

    private func creation(of ids: [String]) -> [String] {
        ["nvidia-smi", "mig", "-i", "\(gpu)", "-cgi", ids.joined(separator: ","), "-C"]
    }

    private func create(_ ids: [String]) throws {
        let command = creation(of: ids)
        try tools.run(command[0], Array(command.dropFirst()), hint: hint)
    }

    private func clear() throws {
        for instance in try instances() {
            // One without compute instances has none to destroy, and says so.
            _ = try? tools.run("nvidia-smi", ["mig", "-i", "\(gpu)", "-gi", instance.id, "-dci"], hint: hint)
            try tools.run("nvidia-smi", ["mig", "-i", "\(gpu)", "-gi", instance.id, "-dgi"], hint: hint)
        }
    }
}

/// Words after "MIG" of each row of nvidia-smi's tables: "|   0  MIG 1g.5gb       19     7/7 …".
func migRows(_ output: String) -> [[String]] {
    output.split(separator: "\n").compactMap { line in
        let words = line.split { $0.isWhitespace || $0 == "|" }.map(String.init)
        guard words.count >= 4, words[1] == "MIG", UInt32(words[0]) != nil, UInt32(words[3]) != nil else { return nil }
        return Array(words.dropFirst(2))
    }
}

/// Distinct orders, at most 5040 (seven instances are all that a GPU has), the largest first ones first: those leave
/// the fewest holes.
func orderings(_ names: [String]) -> [[String]] {
    var result: [[String]] = []
    func extend(_ order: [String], _ rest: [String]) {
        if rest.isEmpty { return result.append(order) }
        for name in Set(rest).sorted(by: >) {
            var left = rest
            if let index = left.firstIndex(of: name) { left.remove(at: index) }
            extend(order + [name], left)
        }
    }
    extend([], Array(names.prefix(7)))
    return result
}
