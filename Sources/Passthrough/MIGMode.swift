import FlotillaProtocol
import HostKit

/// Asks `nvidia-smi` for the MIG mode of functions that NVIDIA's driver has; sysfs doesn't tell. Takes a second or so.
/// Where there is none, or it doesn't answer within 5 s, the mode stays unknown.
package func readMIG(_ tree: inout DeviceTree, program: String? = Program.find("nvidia-smi")) {
    guard let program, tree.functions.contains(where: { $0.function.driver == "nvidia" }),
        let outcome = try? Program.run(
            program, ["--query-gpu=pci.bus_id,mig.mode.current", "--format=csv,noheader"], limit: .seconds(5)),
        outcome.status == 0
    else { return }
    let modes = migModes(outcome.output)
    for index in tree.functions.indices { tree.functions[index].mig = modes[tree.functions[index].address] }
}

/// Lines such as "00000000:3B:00.0, Enabled"; "[N/A]" for a GPU without MIG.
func migModes(_ output: String) -> [PciAddress: String] {
    var modes: [PciAddress: String] = [:]
    for line in output.split(separator: "\n").prefix(256) {
        let fields = line.split(separator: ",").map { $0.filter { !$0.isWhitespace }.lowercased() }
        guard fields.count == 2, let address = PciAddress(fields[0]), ["enabled", "disabled"].contains(fields[1]) else {
            continue
        }
        modes[address] = fields[1]
    }
    return modes
}
