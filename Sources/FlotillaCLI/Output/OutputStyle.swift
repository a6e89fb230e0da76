import FlotillaProtocol
import Glibc

/// How a command shows what happens. A new style is a compile error wherever a view is chosen.
enum OutputStyle: Sendable {
    /// A terminal: bars that redraw in place.
    case live
    /// A pipe or a file: one line per step.
    case lines
    /// One JSON object per event.
    case json

    init(json: Bool) {
        let dumb = getenv("TERM").map { String(cString: $0) == "dumb" } ?? true
        self = json ? .json : isatty(STDOUT_FILENO) == 1 && !dumb ? .live : .lines
    }

    func view() -> any MigrationView {
        switch self {
        case .live: LiveView()
        case .lines: LinesView()
        case .json: JSONView()
        }
    }
}

/// Shows migrations as they go. Called from several tasks at once.
protocol MigrationView: Sendable {
    func show(_ event: MigrationEvent)
    /// All have ended.
    func finish(_ migrations: [Migration])
}
