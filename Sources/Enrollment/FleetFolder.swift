package import HostKit
import MigrationModel
import Messaging

/// Keys and certificates of a fleet member, in one folder:
///
///     signing.key            its Ed25519 key
///     tls.key  tls.pem       its client certificate for the broker
///     ca.pem                 who signs such certificates, the broker's included
///     trusted/NAME/*.pem     the public keys it believes, by owner
///
/// and on the coordinator's machine alone:
///
///     ca.key                 what signs certificates
package struct FleetFolder: Sendable {
    package let path: String

    package init(_ path: String) { self.path = path }

    package var signingKey: String { "\(path)/signing.key" }
    package var tlsKey: String { "\(path)/tls.key" }
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
        try Files.createDirectories(path, mode: 0o755)
        try Files.requireProtected(path)
    }

    /// Reads the member's signing key, or makes one.
    func ownKey() throws -> SigningKey {
        if Files.exists(signingKey) { return try SigningKey(path: signingKey) }
        let key = SigningKey()
        try Files.writeAtomically(key.pem, to: signingKey, mode: 0o600)
        return key
    }

    /// Adds a public key beside those the owner has. The same one twice is one.
    package func trust(_ key: PublicKey, of owner: String) throws {
        try Files.createDirectories("\(trusted)/\(owner)", mode: 0o755)
        try Files.writeAtomically(key.pem, to: "\(trusted)/\(owner)/\(key.id).pem", mode: 0o644)
    }

    /// Takes away the owner's keys but for one. Returns the ids of those taken.
    package func distrust(_ owner: String, except kept: String?) throws -> [String] {
        let folder = "\(trusted)/\(owner)"
        var removed: [String] = []
        for name in Files.isDirectory(folder) ? try Files.list(folder) : [] where name != kept.map({ "\($0).pem" }) {
            try Files.remove("\(folder)/\(name)")
            removed.append(String(name.dropLast(".pem".count)))
        }
        return removed
    }
}
