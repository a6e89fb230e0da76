package import HostKit
import MigrationModel
import Synchronization

/// The public keys a member of the fleet believes, by the name of their owner. A folder holds one folder for each
/// owner with any number of PEM files in it: during a rotation the old key and the new one lie side by side.
package final class KeyRing: Sendable {
    private struct State {
        var keys: [String: [String: PublicKey]]
        var readAt: ContinuousClock.Instant?
    }

    private let folder: String?
    private let state: Mutex<State>

    /// A folder is read again after this long, and at once for a key that isn't known, but at most every second:
    /// adding a key takes effect at once, removing one within a minute.
    private static let maximumAge = Duration.seconds(60)
    private static let minimumAge = Duration.seconds(1)

    package init(_ keys: [String: [PublicKey]]) {
        folder = nil
        state = Mutex(State(keys: keys.mapValues(Self.byID)))
    }

    /// Throws when the folder can't be read, a file in it is no public key, or others than its owner may write to it.
    package init(folder: String) throws {
        self.folder = folder
        state = Mutex(State(keys: try Self.read(folder), readAt: .now))
    }

    package func key(_ id: String, of owner: String) throws -> PublicKey? {
        try state.withLock { state in
            try refresh(&state, isUrgent: state.keys[owner]?[id] == nil)
            return state.keys[owner]?[id]
        }
    }

    /// Those who have a key.
    package func owners() throws -> [String] {
        try state.withLock { state in
            try refresh(&state, isUrgent: true)
            return state.keys.filter { !$0.value.isEmpty }.keys.sorted()
        }
    }

    private func refresh(_ state: inout State, isUrgent: Bool) throws {
        guard let folder, let readAt = state.readAt,
            ContinuousClock.now - readAt > (isUrgent ? Self.minimumAge : Self.maximumAge)
        else { return }
        state.keys = try Self.read(folder)
        state.readAt = .now
    }

    private static func byID(_ keys: [PublicKey]) -> [String: PublicKey] {
        Dictionary(keys.map { ($0.id, $0) }, uniquingKeysWith: { first, _ in first })
    }

    private static func read(_ folder: String) throws -> [String: [String: PublicKey]] {
        try Files.requireProtected(folder)
        var keys: [String: [String: PublicKey]] = [:]
        for owner in try Files.list(folder) where Files.isDirectory("\(folder)/\(owner)") {
            try Files.requireProtected("\(folder)/\(owner)")
            let files = try Files.list("\(folder)/\(owner)").filter { $0.hasSuffix(".pem") }
            keys[owner] = byID(try files.map { try PublicKey(path: "\(folder)/\(owner)/\($0)") })
        }
        return keys
    }
}
