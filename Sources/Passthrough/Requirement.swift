/// One thing that must be so before a device can go to a VM, and whether it is.
package struct Requirement: Sendable, Encodable, Hashable {
    package enum Verdict: String, Sendable, Encodable {
        case pass, warn, fail
    }

    package var verdict: Verdict
    /// An address, or "host".
    package var subject: String
    /// "IOMMU group", "console".
    package var requirement: String
    package var found: String
    /// The next step; nil when it passed.
    package var remedy: String?

    static func pass(_ subject: String, _ requirement: String, _ found: String) -> Self {
        Self(verdict: .pass, subject: subject, requirement: requirement, found: found)
    }

    static func warn(_ subject: String, _ requirement: String, _ found: String, remedy: String) -> Self {
        Self(verdict: .warn, subject: subject, requirement: requirement, found: found, remedy: remedy)
    }

    static func fail(_ subject: String, _ requirement: String, _ found: String, remedy: String) -> Self {
        Self(verdict: .fail, subject: subject, requirement: requirement, found: found, remedy: remedy)
    }
}
