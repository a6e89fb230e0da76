/// What is wrong with a manifest file, and where.
package struct ManifestProblem: Sendable, Equatable, CustomStringConvertible {
    /// "disks[0].source.sha256"; empty for the whole file.
    package var path: String
    package var message: String
    /// The next step.
    package var remedy: String

    init(_ path: String, _ message: String, _ remedy: String) {
        self.path = path
        self.message = message
        self.remedy = remedy
    }

    package var description: String { path.isEmpty ? message : "\(path): \(message)" }
}
