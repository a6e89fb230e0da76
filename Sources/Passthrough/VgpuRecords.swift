import FoundationEssentials
import HostKit
import MigrationModel

/// A vGPU that flotilla made or is about to make: the mark that tells ours from others'.
package struct VgpuRecord: Sendable, Codable, Hashable {
    package enum Phase: String, Sendable, Codable {
        /// Written before the kernel is asked.
        case creating
        case present
        case destroying
    }

    package var owner: GPUOwner
    /// The manifest's device, "gpu0": with the migration it names the vGPU.
    package var device: String
    package var function: String
    package var physical: String
    package var path: VgpuPlace.Path
    package var typeID: String
    package var profile: String
    /// Of a mediated device.
    package var uuid: String?
    package var parameters: [String] = []
    package var phase: Phase = .creating
    /// mdevctl makes it again at boot; all others are made by `flotilla gpu restore`.
    package var isInMdevctl = false
}

extension VgpuRecord {
    var resource: GPUResource? {
        let places = [PciAddress(function), PciAddress(physical)].compactMap(\.self)
        if let uuid { return GPUResource(mdev: uuid, partOf: Array(Set(places)).sorted()) }
        return places.first.map { GPUResource(function: $0, partOf: function == physical ? nil : places.last) }
    }
}

/// The file of records. Every change is made under a lock between processes that the caller holds.
struct VgpuRecords: Sendable {
    private struct Book: Codable {
        var version = 1
        var vgpus: [VgpuRecord] = []
    }

    let path: String

    func read() throws -> [VgpuRecord] {
        guard Files.exists(path) else { return [] }
        guard let book = try? JSONDecoder().decode(Book.self, from: Data(Files.read(path))), book.version == 1 else {
            throw MigrationError(
                .dataLoss, "the list of vGPUs made here, \(path), is damaged or of another version",
                hint: "move it away; the vGPUs it named have to be destroyed by hand then")
        }
        return book.vgpus
    }

    private func write(_ records: [VgpuRecord]) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.writeAtomically([UInt8](encoder.encode(Book(vgpus: records))), to: path)
    }

    func put(_ record: VgpuRecord) throws {
        var all = try read().filter { !$0.isSame(as: record) }
        all.append(record)
        try write(all)
    }

    func remove(_ record: VgpuRecord) throws { try write(read().filter { !$0.isSame(as: record) }) }
}

extension VgpuRecord {
    func isSame(as other: VgpuRecord) -> Bool { owner.isSame(as: other.owner) && device == other.device }
}
