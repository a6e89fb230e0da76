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
    func supportedTypes(of gpu: PciAddress) -> [SupportedVgpu] {
        supportedVgpus(ask("vgpu", "-s", "-v", "-i", "\(gpu)") ?? "")
    }
}

/// A vGPU type that a GPU's driver knows.
struct SupportedVgpu: Equatable {
    /// The GPU that it was listed for.
    var gpu: PciAddress?
    /// In decimal.
    var id: String
    var name = ""
    /// How many a GPU holds; 0 where that isn't told.
    var most: UInt32 = 0
    /// The kind of GPU instance that it lives on, a number of `nvidia-smi mig -lgip`; nil for time-sliced ones of the whole
    /// GPU, and of drivers that don't tell.
    var instance: String?
    /// How many share an instance; 0 where that isn't told.
    var mostPerInstance: UInt32 = 0
}

/// "GPU 00000000:3B:00.0", and below it blocks that begin with "vGPU Type ID : 0x2e", of "Name : GRID M60-2Q",
/// "GPU Instance Profile ID : N/A" and more.
func supportedVgpus(_ output: String) -> [SupportedVgpu] {
    var types: [SupportedVgpu] = []
    var gpu: PciAddress?
    for line in output.split(separator: "\n") {
        if line.hasPrefix("GPU ") {
            gpu = PciAddress(line.dropFirst(4).filter { !$0.isWhitespace }.lowercased())
            continue
        }
        let sides = line.split(separator: ":", maxSplits: 1).map { side in
            side.split(whereSeparator: \.isWhitespace).joined(separator: " ")
        }
        guard sides.count == 2 else { continue }
        if sides[0] == "vGPU Type ID" {
            guard let id = UInt32(sides[1].replacing("0x", with: ""), radix: 16) else { continue }
            types.append(SupportedVgpu(gpu: gpu, id: "\(id)"))
            continue
        }
        guard let last = types.indices.last else { continue }
        switch sides[0] {
        case "Name": types[last].name = sides[1]
        case "Max Instances": types[last].most = UInt32(sides[1]) ?? 0
        case "GPU Instance Profile ID": types[last].instance = UInt32(sides[1]).map(String.init)
        case "Max Instances Per GI": types[last].mostPerInstance = UInt32(sides[1]) ?? 0
        default: break
        }
    }
    return types
}
