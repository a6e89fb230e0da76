package import FlotillaProtocol
import SwiftProtobuf

/// Adds what a host's GPUs have of vGPUs, and what decides on how many more. Asks nvidia-smi, which takes a second or so for
/// a question, only where sysfs doesn't tell.
package func addVgpus(_ functions: inout [PciFunction], of vgpus: VgpuHost) throws {
    let places = Dictionary(grouping: vgpus.places(), by: \.physical)
    guard !places.isEmpty else { return }
    let index = Dictionary(functions.enumerated().map { ($1.address, $0) }) { first, _ in first }
    let records = try vgpus.records()
    let mixed = try vgpus.store.mixedSizes()
    let isNVIDIA = functions.contains { $0.id.vendor == 0x10de && $0.driver == "nvidia" }
    let migs = isNVIDIA ? vgpus.migs(of: Array(places.keys)) : [:]
    for (gpu, places) in places {
        // Only while it holds vGPUs its types don't tell how much it has.
        let isVendors = places.contains { $0.path == .vendor && !$0.isEmpty }
        let types = isVendors ? vgpus.tools.supportedTypes(of: gpu) : []
        for place in places {
            guard let at = index["\(place.function)"] else { continue }
            let offers = place.types()
            functions[at].vgpuPath = place.path.rawValue
            functions[at].vgpuTypes = offers
            functions[at].hasVgpu_p = place.isOccupied
            functions[at].vgpuProfiles = place.profiles(records, types)
        }
        guard let at = index["\(gpu)"] else { continue }
        functions[at].mixedSizes = mixed.contains("\(gpu)")
        functions[at].framebufferMib = frameBuffer(places, types)
        if let mig = migs[gpu] { functions[at].mig = mig }
    }
}

extension VgpuHost {
    /// How these GPUs are cut into instances. Those of which nvidia-smi does not tell are missing. Takes a second or so for
    /// each of its five answers, however many GPUs there are, and not more than 10.
    package func migs(of gpus: [PciAddress]) -> [PciAddress: Mig] {
        var tools = tools
        tools.limit = .seconds(10)
        var result: [PciAddress: Mig] = [:]
        let list = tools.ask("--query-gpu=index,pci.bus_id,mig.mode.current", "--format=csv,noheader") ?? ""
        let cards = list.split(separator: "\n").compactMap { line -> (number: String, gpu: PciAddress, mode: String)? in
            guard let comma = line.firstIndex(of: ","),
                let (gpu, mode) = migModes(String(line[line.index(after: comma)...])).first, gpus.contains(gpu)
            else { return nil }
            return (line[..<comma].filter { !$0.isWhitespace }, gpu, mode)
        }
        for card in cards where card.mode == "disabled" { result[card.gpu] = Mig() }
        guard result.count < cards.count, let tables = try? tools.migTables(of: [], hint: "") else { return result }
        let types = supportedVgpus(tools.ask("vgpu", "-s", "-v") ?? "")
        for card in cards where card.mode == "enabled" {
            result[card.gpu] = Mig(
                profiles: tables.profiles, placements: tables.placements, instances: tables.instances, of: card.number,
                vgpus: types.filter { $0.gpu == card.gpu })
        }
        return result
    }
}

/// The largest time-sliced profile is the whole of it. A mediated device's types are all listed, whether they can be made
/// or not.
private func frameBuffer(_ places: [VgpuPlace], _ types: [SupportedVgpu]) -> UInt32 {
    let listed = places.contains { $0.path == .vendor && !$0.isEmpty } ? [] : places.flatMap { $0.types() }.map(\.name)
    return (types.map(\.name) + listed).map { VgpuProfile($0) }
        .filter { $0.gpuInstance == nil }.compactMap(\.frameBufferMiB).max() ?? 0
}

extension VgpuPlace {
    /// Of its vGPUs; empty where nobody tells.
    ///
    /// - Parameter types: of its GPU.
    func profiles(_ records: [VgpuRecord], _ types: [SupportedVgpu]) -> [String] {
        switch path {
        case .mdev:
            mediatedDevices.map { uuid in
                records.first { $0.uuid == uuid }?.profile ?? sysfs.text("\(folder)/\(uuid)/mdev_type/name") ?? ""
            }
        case .vendor:
            currentType.map { type in
                let record = records.first { $0.function == "\(function)" && $0.typeID == type }
                return [record?.profile ?? types.first { $0.id == type }?.name ?? ""]
            } ?? []
        }
    }
}
