import MigrationModel

/// A disk on a web server.
package struct HTTPLocation: Sendable {
    let url: String
    /// For messages: without what may be a secret.
    package let name: String
    /// PEM file of authorities that are trusted instead of the system's.
    let authorities: String?
    /// How often a failing server is asked again before it is given up: 8 times take 51 s.
    package var retries = 8

    package static func isOne(_ text: String) -> Bool {
        let scheme = text.prefix { $0 != ":" }.lowercased()
        return scheme == "http" || scheme == "https"
    }

    /// - Parameter authorities: nil for those of the system.
    package init(_ url: String, authorities: String? = nil) throws {
        let parts = url.split(separator: "/", maxSplits: 3, omittingEmptySubsequences: false)
        guard Self.isOne(url), parts.count > 2, parts[1].isEmpty, !parts[2].isEmpty else {
            throw MigrationError(.invalidArgument, "not an http or https URL with a host", hint: "https://host/path")
        }
        let account = parts[2].lastIndex(of: "@").map { parts[2][..<$0] }
        let plain = url.prefix { $0 != "?" && $0 != "#" }
        name =
            account.map { String(plain[..<$0.startIndex]) + String(plain[$0.endIndex...].dropFirst()) } ?? String(plain)
        guard account?.contains(":") != true else {
            throw MigrationError(
                .invalidArgument, "\(name): other users of this host see a password on the command line",
                hint: "put it into ~/.netrc: machine HOST login USER password PASSWORD")
        }
        self.url = url
        self.authorities = authorities
    }
}
