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
    /// mdevctl makes it again at boot, or is about to know it; all others are made by `flotilla gpu restore`.
    package var isInMdevctl = false
    /// The boot in which its parameters were set: the next one has forgotten them, whoever makes it again.
    package var tunedIn: String?
}

extension VgpuRecord {
    package var resource: GPUResource? {
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
        /// Physical functions that hold several sizes; nil in books of earlier versions.
        var mixed: [String]?
    }

    let path: String

    func read() throws -> [VgpuRecord] { try book().vgpus }

    func mixedSizes() throws -> Set<String> { try Set(book().mixed ?? []) }

    private func book() throws -> Book {
        guard Files.exists(path) else { return Book() }
        guard let book = try? JSONDecoder().decode(Book.self, from: Data(Files.read(path))), book.version == 1 else {
            throw MigrationError(
                .dataLoss, "the list of vGPUs made here, \(path), is damaged or of another version",
                hint: "move it away; the vGPUs it named have to be destroyed by hand then")
        }
        return book
    }

    private func write(_ book: Book) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.writeAtomically([UInt8](encoder.encode(book)), to: path)
    }

    /// One that is there keeps its place: they are made again in the order in which they were made.
    func put(_ record: VgpuRecord) throws {
        var book = try book()
        if let index = book.vgpus.firstIndex(where: { $0.isSame(as: record) }) {
            book.vgpus[index] = record
        } else {
            book.vgpus.append(record)
        }
        try write(book)
    }

    func remove(_ record: VgpuRecord) throws {
        var book = try book()
        book.vgpus.removeAll { $0.isSame(as: record) }
        try write(book)
    }

    func setMixedSizes(_ isMixed: Bool, of gpu: PciAddress) throws {
        var book = try book()
        let others = Set(book.mixed ?? []).subtracting(["\(gpu)"])
        book.mixed = (isMixed ? others.union(["\(gpu)"]) : others).sorted()
        try write(book)
    }
}

extension VgpuRecord {
    func isSame(as other: VgpuRecord) -> Bool { owner.isSame(as: other.owner) && device == other.device }
}
