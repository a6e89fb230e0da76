import Glibc
package import HostKit
import MigrationModel
import Messaging
import Synchronization

/// Keys and certificates of a fleet member, in one folder:
///
///     signing.key            its Ed25519 key
///     tls.key  tls.pem       its client certificate for the broker
///     ca.pem                 who signs such certificates, the broker's included
///     trusted/NAME/*.pem     the public keys it believes, by owner
///
/// on a host that asked for others, until they are granted:
///
///     signing.key.new  tls.key.new
///
/// and on the coordinator's machine alone:
///
///     ca.key                 what signs certificates
package struct FleetFolder: Sendable {
    package let path: String
    private let plan: Plan?

    /// - Parameter plan: of a dry run: takes note of what would be done, and nothing is.
    package init(_ path: String, plan: Plan? = nil) { (self.path, self.plan) = (path, plan) }

    /// What would be made, written and removed, in order.
    package final class Plan: Sendable {
        private struct State {
            var steps: [String] = []
            /// Of a key that the dry run made for itself: the one that will be made has another.
            var inventedID: String?
        }

        private let state = Mutex(State())

        package init() {}

        package var steps: [String] { state.withLock { $0.steps } }

        fileprivate func note(_ step: String) { state.withLock { $0.steps.append(step) } }
        fileprivate func invent(_ id: String) { state.withLock { $0.inventedID = id } }
        fileprivate func isInvented(_ id: String) -> Bool { state.withLock { $0.inventedID == id } }
    }

    package var signingKey: String { "\(path)/signing.key" }
    package var tlsKey: String { "\(path)/tls.key" }
    var nextSigningKey: String { "\(signingKey).new" }
    var nextTLSKey: String { "\(tlsKey).new" }
    package var certificate: String { "\(path)/tls.pem" }
    package var authority: String { "\(path)/ca.pem" }
    package var authorityKey: String { "\(path)/ca.key" }
    package var trusted: String { "\(path)/trusted" }

    /// Hosts that were enrolled here.
    package func hosts() throws -> [String] {
        guard Files.isDirectory(trusted) else { return [] }
        return try KeyRing(folder: trusted).owners().filter { $0 != FleetMember.coordinator }
    }

    /// Makes the folder if it isn't there. Throws `permissionDenied` when others can change it.
    func prepare() throws {
        if let plan, !Files.isDirectory(path) { return plan.note("make folder \(path), mode 755") }
        try Files.createDirectories(path, mode: 0o755)
        try Files.requireProtected(path)
    }

    /// Puts one of the member's files in place.
    func write(_ bytes: [UInt8], to file: String, mode: UInt32) throws {
        if let plan {
            let place = Files.exists(file) ? ", in place of the one there" : ""
            return plan.note("write \(file), mode \(String(mode, radix: 8))\(place)")
        }
        try Files.createDirectories(Files.parent(of: file), mode: 0o755)
        try Files.writeAtomically(bytes, to: file, mode: mode)
    }

    /// Puts a file in the place of another. One that was moved before is fine.
    func move(_ file: String, to place: String) throws {
        guard Files.exists(file) else { return }
        if let plan { return plan.note("move \(file) to \(place)") }
        guard rename(file, place) == 0 else { throw systemError("rename \(file) to", place) }
        try Files.synchronizeDirectory(of: place)
    }

    /// Reads the member's signing key, or makes one.
    ///
    /// - Parameter isNext: the one that is to take its place.
    func ownKey(isNext: Bool = false) throws -> SigningKey {
        let file = isNext ? nextSigningKey : signingKey
        if Files.exists(file) { return try SigningKey(path: file) }
        let key = SigningKey()
        plan?.invent(key.publicKey.id)
        try write(key.pem, to: file, mode: 0o600)
        return key
    }

    /// Adds a public key beside those the owner has. The same one twice is one.
    package func trust(_ key: PublicKey, of owner: String) throws {
        let name = plan?.isInvented(key.id) == true ? "ID-OF-THE-NEW-KEY" : key.id
        try write(key.pem, to: "\(trusted)/\(owner)/\(name).pem", mode: 0o644)
    }

    /// Believes the owner's keys no more, all or all but one. Returns the ids of those that were taken away; the owner's folder
    /// and whatever else lies in it stay. What the coordinator has can be forgotten only beside a key of its that stays.
    ///
    /// - Throws: `invalidArgument` for what names no host, `notFound` for one that nothing is known of and for a `kept` that
    ///   the owner does not have. Nothing is removed then.
    package func forget(_ owner: String, except kept: String? = nil) throws -> [String] {
        guard FleetMember.isHostName(owner) || owner == FleetMember.coordinator && kept != nil else {
            throw MigrationError(
                .invalidArgument, "'\(owner)' can't name a host whose keys are all forgotten",
                hint: owner == FleetMember.coordinator
                    ? "name the coordinator's key that stays with --keep" : FleetMember.hostNameRule)
        }
        guard Files.isDirectory("\(trusted)/\(owner)") else {
            let known = try hosts().joined(separator: ", ")
            throw MigrationError(
                .notFound, "\(trusted) has no keys of \(owner)",
                hint: known.isEmpty ? "no host is enrolled there" : "it has keys of \(known)")
        }
        let ids = try keys(of: owner)
        if let kept, !ids.contains(kept) {
            throw MigrationError(
                .notFound, "\(owner) has no key \(kept) that could be kept: nothing was forgotten",
                hint: ids.isEmpty ? "it has none" : "it has \(ids.joined(separator: ", "))")
        }
        return try distrust(owner, except: kept)
    }

    /// Takes away the owner's keys but for one. Returns the ids of those taken.
    func distrust(_ owner: String, except kept: String?) throws -> [String] {
        let removed = try keys(of: owner).filter { $0 != kept }
        for id in removed {
            let file = "\(trusted)/\(owner)/\(id).pem"
            if let plan { plan.note("remove \(file)") } else { try Files.remove(file) }
        }
        if plan == nil, let last = removed.last {
            try Files.synchronizeDirectory(of: "\(trusted)/\(owner)/\(last).pem")
        }
        return removed
    }

    /// Ids of the keys that are believed to be the owner's.
    package func keys(of owner: String) throws -> [String] {
        let folder = "\(trusted)/\(owner)"
        guard Files.isDirectory(folder) else { return [] }
        return try Files.list(folder).filter { $0.hasSuffix(".pem") && !Files.isDirectory("\(folder)/\($0)") }
            .map { String($0.dropLast(".pem".count)) }
    }
}
