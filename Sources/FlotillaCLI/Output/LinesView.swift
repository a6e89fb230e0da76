import Coordinator
import FlotillaProtocol
import HostKit
import Synchronization

/// One line per step, for pipes and logs.
final class LinesView: MigrationView {
    private let narrator = Mutex(Narrator())

    func show(_ event: MigrationEvent) {
        narrator.withLock { narrator in for line in narrator.lines(of: event) { Console.line(line) } }
    }

    func finish(_ migrations: [Migration]) { Console.line(Summary(migrations).text) }
}

/// Turns events into lines, leaving out what was said before.
struct Narrator {
    private var names: [String: String] = [:]
    private var said: [String: String] = [:]

    /// The VM's name once it is known, else the source.
    mutating func name(of id: String) -> String { names[id] ?? id }

    mutating func lines(of event: MigrationEvent) -> [String] {
        switch event.event {
        case .state(let migration):
            names[migration.id] = migration.title
            let stage = migration.stages.last { $0.state == "running" || $0.state == "waiting" }
            let text =
                if let reason = migration.waitsForHost { "\(reason.message); \(reason.remedy)" } else {
                    words(for: migration, stage)
                }
            // The same attempt's start is told once; a retry is news.
            let key = "\(text) \(stage?.attempt ?? 0)"
            guard !text.isEmpty, said[migration.id] != key else { return [] }
            said[migration.id] = key
            return [
                "\(migration.title): \(text)\(stage.map { $0.attempt > 1 ? " (attempt \($0.attempt))" : "" } ?? "")"
            ]
        case .step(let step):
            let subject = step.step.subject
            let title = name(of: event.migrationID)
            return ["\(title): \(step.stage): \(subject == title ? "" : "\(subject): ")\(step.step.message)"]
        case .progress, nil: return []
        }
    }

    /// Empty where there is nothing to say yet.
    private func words(for migration: Migration, _ stage: StageSummary?) -> String {
        switch migration.state {
        case .exporting, .converting, .deploying:
            stage.map {
                $0.state != "running" ? "" : "\($0.name): \(migration.request.dryRun ? "planned" : "started")"
            } ?? ""
        case .done: "done"
        case .ready: "nothing stands in the way"
        case .preflightBlocked: "blocked: nothing was changed"
        case .failed: "failed: \(migration.errorMessage)"
        case .cancelled: "cancelled"
        case .rollingBack: stage.map { $0.state != "running" ? "" : "\($0.name): started" } ?? ""
        case .rolledBack: "rolled back"
        case .unspecified, .UNRECOGNIZED: ""
        }
    }
}

extension Migration {
    /// What people call it.
    var title: String {
        if !manifest.vm.name.isEmpty { return manifest.vm.name }
        return request.vmName.isEmpty ? Files.name(of: request.sourceURL) : request.vmName
    }

    /// Why its host can't go on with it: the coordinator has no key of the host.
    var waitsForHost: Finding? { findings.first { $0.subject == Finding.enrollment } }
}
