import Deploy
import FlotillaProtocol
import MigrationModel
import SwiftProtobuf

/// What came of each VM, for people.
struct Summary {
    private let migrations: [Migration]

    init(_ migrations: [Migration]) { self.migrations = migrations }

    var text: String { migrations.map(section).joined(separator: "\n") }

    private func section(_ migration: Migration) -> String {
        var lines = ["", heading(migration)]
        if !migration.stages.isEmpty {
            lines += table(
                ["stage", "state", "time", "attempts"],
                migration.stages.map { [$0.name, $0.state, $0.duration, "\($0.attempt)"] })
        }
        for stage in migration.stages where stage.secondsWithoutProgress > 0 {
            lines += describe(
                .with {
                    $0.severity = .warning
                    $0.message =
                        "\(stage.name) on \(stage.host): no progress for \(stage.secondsWithoutProgress / 60) minutes"
                    $0.remedy =
                        "look there at what it waits for, storage or a server; to stop it: flotilla migration cancel "
                        + migration.id
                })
        }
        let disks = migration.manifest.disks.filter { $0.hasTarget }
        if !disks.isEmpty {
            lines += table(
                ["disk", "size", "on disk", "image"],
                disks.map {
                    [
                        $0.id, byteText($0.capacityBytes),
                        $0.target.allocatedBytes > 0 ? byteText($0.target.allocatedBytes) : "-", $0.target.path,
                    ]
                })
            for disk in disks where !disk.source.contentSha256.isEmpty {
                if !disk.source.sha256.isEmpty { lines.append("  \(disk.id) source   sha256:\(disk.source.sha256)") }
                lines.append("  \(disk.id) content  sha256:\(disk.source.contentSha256)")
            }
        }
        for finding in migration.findings { lines += describe(finding) }
        if migration.result.hasDomainState {
            lines.append(
                "  domain   \(migration.result.domainName), \(migration.result.domainState), "
                    + "UUID \(migration.result.domainUuid)")
        }
        if !migration.result.devices.isEmpty {
            lines.append("  devices  \(migration.result.devices.joined(separator: ", "))")
        }
        if !migration.result.proof.isEmpty { lines.append("  proof    \(migration.result.proof)") }
        if !migration.result.guestDevices.isEmpty {
            lines.append("  guest    sees \(migration.result.guestDevices.joined(separator: ", "))")
        }
        if migration.result.hasBenchmark { lines.append("  GPU      \(migration.result.benchmark.text)") }
        if !migration.errorMessage.isEmpty, migration.state == .failed {
            lines.append("  error    \(migration.errorMessage)")
            if !migration.errorHint.isEmpty { lines.append("           \(migration.errorHint)") }
        }
        if !migration.result.domainXml.isEmpty {
            lines.append("  would define:")
            lines += migration.result.domainXml.split(separator: "\n", omittingEmptySubsequences: false).map {
                "    \($0)"
            }
        }
        return lines.joined(separator: "\n")
    }

    private func heading(_ migration: Migration) -> String {
        let outcome =
            switch migration.state {
            case .done: "done"
            case .failed: "FAILED"
            case .preflightBlocked: "BLOCKED, nothing was changed"
            case .cancelled: "cancelled"
            case .ready: "ready, nothing was changed"
            case .rolledBack: "rolled back: no domain, the disks stay"
            default: "unfinished"
            }
        return "\(migration.title)  \(outcome)"
    }

    private func describe(_ finding: Finding) -> [String] {
        let word =
            switch finding.severity {
            case .blocked: "BLOCKED"
            case .warning: "warning"
            default: "note   "
            }
        let remedy = finding.remedy.isEmpty ? [] : ["           \(finding.remedy)"]
        return ["  \(word)  \(finding.message)"] + remedy
    }
}

extension DeployResult {
    fileprivate var hasDomainState: Bool { !domainState.isEmpty }
}

extension StageSummary {
    /// Seconds from acceptance to end, "12.3 s"; "-" when it did not run.
    fileprivate var duration: String {
        guard hasStartedAt, hasEndedAt else { return "-" }
        let milliseconds = endedAt.moment.milliseconds - startedAt.moment.milliseconds
        let tenths = (milliseconds + 50) / 100
        return milliseconds < 1000 ? "\(milliseconds) ms" : "\(tenths / 10).\(tenths % 10) s"
    }
}
