import Convert
import Glibc
import Synchronization

/// The progress of one conversion: a bar on a terminal, JSON lines, or nothing where output goes to a file. Called from
/// the converting thread.
final class DiskProgressView: Sendable {
    private struct Line: Encodable {
        var doneBytes: UInt64
        var totalBytes: UInt64
        var writtenBytes: UInt64
    }

    private let output: OutputStyle
    private let bar: Mutex<ProgressBar>

    init(title: String, output: OutputStyle) {
        self.output = output
        bar = Mutex(ProgressBar(title: title))
    }

    func show(_ progress: DiskConversion.Progress) {
        // What comes after the data: it takes time where holes must be written.
        if progress.finishBytes > 0 {
            bar.withLock {
                if !$0.title.hasSuffix(Self.finishing) { $0 = ProgressBar(title: $0.title + Self.finishing) }
            }
            show(done: progress.finishedBytes, total: progress.finishBytes, written: progress.writtenBytes)
        } else {
            show(done: progress.doneBytes, total: progress.capacity, written: progress.writtenBytes)
        }
    }

    private static let finishing = " (finishing)"

    func show(done: UInt64, total: UInt64, written: UInt64) {
        switch output {
        case .lines: break
        case .json:
            let line = Line(doneBytes: done, totalBytes: total, writtenBytes: written)
            if let text = try? jsonLine(line) { Console.line(text) }
        case .live:
            var size = winsize()
            let width = ioctl(STDOUT_FILENO, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 20 ? Int(size.ws_col) : 80
            let text = bar.withLock {
                $0.update(done: done, total: total, written: written, now: .now)
                return $0.text(width: width, ended: done == total)
            }
            Console.out("\r\u{1B}[2K\(text)")
        }
    }

    func finish() { if case .live = output { Console.line("") } }
}
