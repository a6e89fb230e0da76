import HostKit
import MigrationModel

extension String {
    /// Columns of a terminal that it takes: letters of East Asian scripts and emoji take two.
    var columns: Int {
        reduce(0) { sum, character in
            guard let scalar = character.unicodeScalars.first else { return sum }
            if [.format, .nonspacingMark, .enclosingMark].contains(scalar.properties.generalCategory) { return sum }
            return sum + (scalar.isWide || character.unicodeScalars.contains("\u{FE0F}") ? 2 : 1)
        }
    }

    /// Its beginning and "…" where it takes more columns; at least eight stay.
    func cut(toColumns limit: Int) -> String {
        let limit = max(limit, 8)
        guard columns > limit else { return self }
        var start = self
        while start.columns > limit - 1 { start.removeLast() }
        return start + "…"
    }
}

extension Unicode.Scalar {
    /// Wide or fullwidth by Unicode's Annex 11, without rare scripts.
    fileprivate var isWide: Bool {
        if properties.isEmojiPresentation { return true }
        return switch value {
        case 0x1100...0x115F, 0x2E80...0x303E, 0x3041...0xA4CF, 0xA960...0xA97C, 0xAC00...0xD7A3, 0xF900...0xFAFF,
            0xFE30...0xFE6F, 0xFF01...0xFF60, 0xFFE0...0xFFE6, 0x20000...0x3FFFD:
            true
        default: false
        }
    }
}

/// "1 VM", "2 VMs".
func counted(_ count: Int, _ noun: String) -> String { "\(count) \(noun)\(count == 1 ? "" : "s")" }

/// Rows under a head, columns as wide as their widest cell, two spaces apart.
func table(_ head: [String], _ rows: [[String]]) -> [String] {
    let all = [head] + rows
    let widths = head.indices.map { column in all.map { $0[column].columns }.max() ?? 0 }
    return all.map { row in
        let cells = row.enumerated().map { column, cell in
            column == row.count - 1 ? cell : cell + String(repeating: " ", count: max(widths[column] - cell.columns, 0))
        }
        var line = "  " + cells.joined(separator: "  ")
        // Of last cells that are empty.
        while line.last == " " { line.removeLast() }
        return line
    }
}

/// "2 × VM Network, Storage Network": those that are alike once, in the order in which they come.
func listed(_ texts: [String]) -> String {
    var counts: [(text: String, count: Int)] = []
    for text in texts {
        if let index = counts.firstIndex(where: { $0.text == text }) {
            counts[index].count += 1
        } else {
            counts.append((text, 1))
        }
    }
    return counts.map { $1 > 1 ? "\($1) × \($0)" : $0 }.joined(separator: ", ")
}

/// "3 s", "5 min", "2 h", "4 d" since a moment.
func age(_ moment: Moment, now: Moment = .now) -> String {
    let seconds = max(0, (now.milliseconds - moment.milliseconds) / 1000)
    return switch seconds {
    case ..<120: "\(seconds) s"
    case ..<7200: "\(seconds / 60) min"
    case ..<172_800: "\(seconds / 3600) h"
    default: "\(seconds / 86400) d"
    }
}
