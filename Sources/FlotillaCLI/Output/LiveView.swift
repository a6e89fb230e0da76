import FlotillaProtocol
import Glibc
import MigrationModel
import Synchronization

/// A bar per disk under conversion, redrawn in place below the lines that stay.
final class LiveView: MigrationView {
    private struct State {
        var narrator = Narrator()
        /// In order of appearance.
        var bars: [(id: String, bar: ProgressBar)] = []
        /// Disks and phases whose last word was said; it may be said again while something else goes on.
        var ended: Set<String> = []
        var drawn = 0
    }

    private let state = Mutex(State())

    func show(_ event: MigrationEvent) {
        state.withLock { state in
            var lines = state.narrator.lines(of: event)
            switch event.event {
            case .progress(let progress):
                let report = progress.progress
                let id = "\(event.migrationID) \(report.subject)"
                let isEnded = report.bytesDone == report.bytesTotal && report.bytesTotal > 0
                let phase = "\(id) \(report.phase)"
                if isEnded, !state.ended.insert(phase).inserted { break }
                if !isEnded { state.ended.remove(phase) }
                let index =
                    state.bars.firstIndex { $0.id == id }
                    ?? {
                        let title = "\(state.narrator.name(of: event.migrationID)) \(report.subject)"
                        state.bars.append((id, ProgressBar(title: title)))
                        return state.bars.count - 1
                    }()
                state.bars[index].bar.update(
                    done: report.bytesDone, total: report.bytesTotal, written: report.bytesWritten, now: .now)
                if isEnded {
                    lines.append(state.bars[index].bar.text(width: Self.width, ended: true))
                    state.bars.remove(at: index)
                }
            case .state(let migration) where migration.state != .converting:
                state.bars.removeAll { $0.id.hasPrefix(migration.id) }
            default: break
            }
            Self.redraw(&state, lines)
        }
    }

    func finish(_ migrations: [Migration]) {
        state.withLock {
            $0.bars = []
            Self.redraw(&$0, [])
        }
        Console.line(Summary(migrations).text)
    }

    /// Columns of the terminal.
    private static var width: Int {
        var size = winsize()
        return ioctl(STDOUT_FILENO, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 20 ? Int(size.ws_col) : 80
    }

    /// Wipes the bars, prints what stays, draws the bars again.
    private static func redraw(_ state: inout State, _ lines: [String]) {
        var text = state.drawn > 0 ? "\u{1B}[\(state.drawn)A\u{1B}[J" : ""
        for line in lines { text += "\(line)\n" }
        let width = width
        for (_, bar) in state.bars { text += "\(bar.text(width: width, ended: false))\n" }
        state.drawn = state.bars.count
        Console.out(text)
    }
}
