package import FlotillaProtocol

extension Manifest {
    package mutating func note(_ subject: String, _ message: String, remedy: String = "") {
        add(.note, subject, message, remedy)
    }

    /// Carried with a difference, or not carried.
    package mutating func warn(_ subject: String, _ message: String, remedy: String) {
        add(.warning, subject, message, remedy)
    }

    /// The VM can't be migrated like this.
    package mutating func block(_ subject: String, _ message: String, remedy: String) {
        add(.blocked, subject, message, remedy)
    }

    private mutating func add(_ severity: Finding.Severity, _ subject: String, _ message: String, _ remedy: String) {
        var finding = Finding()
        finding.severity = severity
        finding.subject = subject
        finding.message = message
        finding.remedy = remedy
        findings.append(finding)
    }
}
