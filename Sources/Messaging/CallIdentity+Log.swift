import HostKit
package import Logging
package import MigrationModel

extension CallIdentity {
    /// W3C Trace Context: all of a migration's tasks are one trace, each attempt a span. Nil for the task of no migration.
    package var traceparent: String? {
        let trace = task.filter { $0 != "-" }.prefix(32)
        guard trace.count == 32, trace.allSatisfy(\.isHexDigit) else { return nil }
        let span = hex(Digest.hash(.sha256, Array("\(self)".utf8)).prefix(8))
        return "00-\(trace)-\(span)-01"
    }

    /// What every line about an attempt holds.
    package func logged(_ others: Logger.Metadata = [:]) -> Logger.Metadata {
        let own: Logger.Metadata = [
            "task": "\(task)", "attempt": "\(attempt)", "fence": "\(fence)", "traceparent": "\(traceparent ?? "-")",
        ]
        return own.merging(others) { $1 }
    }
}
