import FlotillaProtocol
import HostKit
import MigrationModel

/// The vendor's and mdevctl's programs. Tests name a folder with stand-ins.
package struct VgpuTools: Sendable {
    package var folders: [String]
    /// How long one may take.
    var limit: Duration = .seconds(120)

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
        let outcome = try Program.run(program, arguments, limit: limit)
        guard outcome.status == 0 else {
            throw MigrationError(
                .internal, "\(name) \(arguments.joined(separator: " ")): \(outcome.output.prefix(1000))", hint: hint)
        }
        return outcome.output
    }

    /// What nvidia-smi tells; nil where it is not there, fails, or takes more than 10 s.
    func ask(_ arguments: String...) -> String? {
        guard let program = find("nvidia-smi"),
            let outcome = try? Program.run(program, arguments, limit: .seconds(10)), outcome.status == 0
        else { return nil }
        return outcome.output
    }

    /// See `migModes(_:)`.
    func migModes() -> [PciAddress: String]? {
        ask("--query-gpu=pci.bus_id,mig.mode.current", "--format=csv,noheader").map(Passthrough.migModes)
    }

    /// The vGPU types that a GPU's driver knows, whether they can be made now or not. Empty where nvidia-smi does not tell.
    ///
    /// Source: NVIDIA's vGPU user guide, "Listing Supported vGPU Types".
    func supportedTypes(of gpu: PciAddress) -> [(id: String, name: String, frameBufferMiB: UInt32)] {
        vgpuTypes(ask("vgpu", "-s", "-v", "-i", "\(gpu)") ?? "")
    }
}

/// Blocks that begin with "vGPU Type ID : 0x2e", of "Name : GRID M60-2Q", "FB Memory : 2048 MiB" and more.
func vgpuTypes(_ output: String) -> [(id: String, name: String, frameBufferMiB: UInt32)] {
    var types: [(id: String, name: String, frameBufferMiB: UInt32)] = []
    for line in output.split(separator: "\n") {
        let sides = line.split(separator: ":", maxSplits: 1).map { side in
            side.split(whereSeparator: \.isWhitespace).joined(separator: " ")
        }
        guard sides.count == 2 else { continue }
        switch sides[0] {
        case "vGPU Type ID":
            if let id = UInt32(sides[1].replacing("0x", with: ""), radix: 16) { types.append(("\(id)", "", 0)) }
        case "Name" where !types.isEmpty: types[types.count - 1].name = sides[1]
        case "FB Memory" where !types.isEmpty:
            types[types.count - 1].frameBufferMiB = UInt32(sides[1].prefix(while: \.isNumber)) ?? 0
        default: break
        }
    }
    return types
}
