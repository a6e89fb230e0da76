import MigrationModel

/// A disk on a web server.
package struct HTTPLocation: Sendable {
    let url: String
    /// For messages: without what may be a secret.
    package let name: String
    let trust: ServerTrust
    /// Sent with each request, "Cookie: …"; redirects and `~/.netrc` are then ignored, so that these reach nobody else.
    let headers: [String]?
    /// Seconds without a byte after which a connection counts as broken.
    package var patience = 60
    /// The next step when the server isn't trusted.
    package var trustHint = "name its authority's certificate with --cacert FILE; trust is never skipped"
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
        trust = authorities.map { .authorities($0) } ?? .system
        headers = nil
    }

    /// - Parameters:
    ///   - name: for messages; holds nothing secret.
    ///   - headers: sent with each request.
    package init(_ url: String, name: String, trust: ServerTrust, headers: [String]) {
        self.url = url
        self.name = name
        self.trust = trust
        self.headers = headers
    }
}
