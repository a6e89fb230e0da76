package import Download
import HostKit
import MigrationModel

/// A vCenter or ESXi server, the account to use there, and why the server is believed to be the right one.
package struct VIMServer: Sendable {
    /// "vcenter.example:8443"; for messages too.
    package let authority: String
    package let user: String
    package let trust: ServerTrust
    /// Called at each login, so that a changed file counts.
    let password: @Sendable () throws -> String
    /// "https" but for a test's server.
    var scheme = "https"
    /// Told why a call is made once more.
    package var willRetry: @Sendable (String) -> Void = { _ in }

    package init(
        authority: String, user: String, trust: ServerTrust, password: @escaping @Sendable () throws -> String
    ) {
        self.authority = authority
        self.user = user
        self.trust = trust
        self.password = password
    }

    /// - Parameter passwordFile: only its owner can read it; a line end after the password doesn't count.
    package init(authority: String, user: String, trust: ServerTrust, passwordFile: String) {
        self.init(authority: authority, user: user, trust: trust) { try Self.password(inFile: passwordFile) }
    }

    package static func password(inFile path: String) throws -> String {
        guard Files.exists(path) else {
            throw MigrationError(
                .notFound, "password file \(path) is not there",
                hint: "write the password into it, one line, and chmod 600 it")
        }
        var bytes = try Files.readSecret(path)
        if bytes.last == UInt8(ascii: "\n") { bytes.removeLast() }
        if bytes.last == UInt8(ascii: "\r") { bytes.removeLast() }
        guard !bytes.isEmpty, let text = String(validating: bytes, as: UTF8.self), !text.contains("\n") else {
            throw MigrationError(
                .invalidArgument, "\(path): holds no password", hint: "one line of UTF-8 text, nothing else")
        }
        return text
    }

    package static let trustHint =
        "give its authority's certificate (--ca FILE) or its own SHA-256 fingerprint (--fingerprint HEX; a worker's "
        + "configuration: ca, fingerprint); trust is never skipped"

    func url(_ path: String) -> String { "\(scheme)://\(authority)\(path)" }

    /// A resource of the server.
    ///
    /// - Parameter cookie: of the session; goes to this server only.
    func location(_ path: String, name: String, cookie: String? = nil) -> HTTPLocation {
        var location = HTTPLocation(
            url(path), name: name, trust: trust,
            headers: cookie.map { ["Cookie: \($0)"] } ?? [])
        location.trustHint = Self.trustHint
        return location
    }
}
