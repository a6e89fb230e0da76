import FoundationEssentials
import HostKit
import MigrationModel

/// What a function was before it was touched, and how far that went.
struct BindRecord: Codable, Sendable, Equatable {
    enum Phase: String, Codable, Sendable {
        /// Under way; found after a crash: to be undone.
        case binding
        case bound
        /// On its way back; found after a crash: to be finished.
        case releasing
    }

    var address: String
    /// Empty for none.
    var driver: String
    /// `driver_override`; empty for none.
    var override: String
    var phase: Phase
    /// Requested functions it was bound for; it goes back with the last of them.
    var requested: [String]
}

/// The original drivers of functions that this program took from them. Replaced atomically and synced, before the first
/// write to sysfs. Written in one boot it means nothing in the next: sysfs has forgotten everything.
struct BindJournal: Sendable {
    private struct Content: Codable {
        var version = 1
        var boot: String
        var records: [BindRecord]
    }

    let path: String
    let boot: String

    func read() throws -> [BindRecord] {
        guard Files.exists(path) else { return [] }
        guard let content = try? JSONDecoder().decode(Content.self, from: Data(Files.read(path))), content.version == 1
        else {
            throw MigrationError(
                .dataLoss, "the journal of bound devices, \(path), is damaged or of another version",
                hint: "move it away; a reboot gives every device back to its own driver")
        }
        return content.boot == boot ? content.records : []
    }

    func write(_ records: [BindRecord]) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.writeAtomically(
            [UInt8](encoder.encode(Content(boot: boot, records: records.sorted { $0.address < $1.address }))), to: path)
    }
}
