package import HostKit
import MigrationModel
import Synchronization

/// The public keys a member of the fleet believes, by the name of their owner. A folder holds one folder for each
/// owner with any number of PEM files in it: during a rotation the old key and the new one lie side by side.
package final class KeyRing: Sendable {
    private struct State {
        var keys: [String: [String: PublicKey]]
        var readAt: ContinuousClock.Instant?
        /// Why an owner's keys, or with an empty name the folder, could not be read again.
        var failures: [String: any Error] = [:]
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
        var state = State(keys: [:], readAt: .now)
        try Self.read(folder, &state)
        if let failure = state.failures.values.first { throw failure }
        self.state = Mutex(state)
    }

    /// What can't be read any more keeps nobody from being believed who was; throws for a key that is not known then.
    package func key(_ id: String, of owner: String) throws -> PublicKey? {
        try state.withLock { state in
            refresh(&state, isUrgent: state.keys[owner]?[id] == nil)
            if let key = state.keys[owner]?[id] { return key }
            if let failure = state.failures[owner] ?? state.failures[""] { throw failure }
            return nil
        }
    }

    /// False for an owner without a key. One whose keys can't be read any more has those that were known.
    package func hasKey(of owner: String) -> Bool {
        state.withLock { state in
            refresh(&state, isUrgent: state.keys[owner]?.isEmpty ?? true)
            return state.keys[owner]?.isEmpty == false || state.failures[owner] != nil
        }
    }

    /// Those who have a key.
    package func owners() throws -> [String] {
        try state.withLock { state in
            refresh(&state, isUrgent: true)
            if let failure = state.failures[""] { throw failure }
            return state.keys.filter { !$0.value.isEmpty }.keys.sorted()
        }
    }

    private func refresh(_ state: inout State, isUrgent: Bool) {
        guard let folder, let readAt = state.readAt,
            ContinuousClock.now - readAt > (isUrgent ? Self.minimumAge : Self.maximumAge)
        else { return }
        state.readAt = .now
        do { try Self.read(folder, &state) } catch { state.failures[""] = error }
    }

    private static func byID(_ keys: [PublicKey]) -> [String: PublicKey] {
        Dictionary(keys.map { ($0.id, $0) }, uniquingKeysWith: { first, _ in first })
    }

    /// An owner whose keys can't be read keeps those that are known.
    private static func read(_ folder: String, _ state: inout State) throws {
        try Files.requireProtected(folder)
        let known = state.keys
        let owners = try Files.list(folder).filter { Files.isDirectory("\(folder)/\($0)") }
        (state.keys, state.failures) = ([:], [:])
        for owner in owners {
            do { state.keys[owner] = try read("\(folder)/\(owner)") } catch {
                state.keys[owner] = known[owner]
                state.failures[owner] = error
            }
        }
    }

    private static func read(_ folder: String) throws -> [String: PublicKey] {
        try Files.requireProtected(folder)
        let files = try Files.list(folder).filter { $0.hasSuffix(".pem") }
        return byID(try files.map { try PublicKey(path: "\(folder)/\($0)") })
    }
}
