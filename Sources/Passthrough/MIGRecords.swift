import FlotillaProtocol
import FoundationEssentials
import HostKit
import MigrationModel
import SwiftProtobuf

/// GPU instances that flotilla made, and the change of a GPU's instances that is under way. Every change is made under the
/// lock of `VgpuHost`.
struct MIGRecords: Sendable {
    struct Instance: Codable, Sendable, Equatable {
        var name: String
        var id: String
        var start: UInt32
        var size: UInt32

        init(_ instance: MigInstance) {
            (name, id, start, size) = (instance.name, instance.id, instance.start, instance.size)
        }

        var message: MigInstance {
            .with { ($0.name, $0.id, $0.start, $0.size) = (name, id, start, size) }
        }
    }

    /// One that was made for a vGPU, and goes with it. It does not outlive its boot.
    struct Made: Codable, Sendable {
        var gpu: String
        var instance: Instance
        var owner: GPUOwner
        var device: String
        var boot: String

        func isFor(_ owner: GPUOwner, _ device: String) -> Bool {
            self.owner.isSame(as: owner) && self.device == device
        }

        /// One vGPU may have several: those it shared with others that are gone.
        func isSame(_ other: Made) -> Bool {
            isFor(other.owner, other.device) && gpu == other.gpu && instance == other.instance && boot == other.boot
        }
    }

    /// Written before the first instance is touched: what to go back to after a crash.
    struct Change: Codable, Sendable {
        var gpu: String
        var boot: String
        /// What is being added, and where, if that is known.
        var name: String
        var start: UInt32?
        var before: [Instance]
        /// Those before are made again elsewhere.
        var isRearranging: Bool
    }

    struct Book: Codable, Sendable {
        var version = 1
        var made: [Made] = []
        var change: Change?
    }

    let path: String

    func read() throws -> Book {
        guard Files.exists(path) else { return Book() }
        guard let book = try? JSONDecoder().decode(Book.self, from: Data(Files.read(path))), book.version == 1 else {
            throw MigrationError(
                .dataLoss, "the list of GPU instances made here, \(path), is damaged or of another version",
                hint: "move it away; look at nvidia-smi mig -lgi and destroy by hand those that are not wanted")
        }
        return book
    }

    func update(_ body: (inout Book) -> Void) throws {
        var book = try read()
        body(&book)
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.writeAtomically([UInt8](encoder.encode(book)), to: path)
    }
}
