import HostKit
import MigrationModel

/// Rows under a head, columns as wide as their widest cell, two spaces apart.
func table(_ head: [String], _ rows: [[String]]) -> [String] {
    let all = [head] + rows
    let widths = head.indices.map { column in all.map { $0[column].count }.max() ?? 0 }
    return all.map { row in
        let cells = row.enumerated().map { column, cell in
            column == row.count - 1 ? cell : cell + String(repeating: " ", count: max(widths[column] - cell.count, 0))
        }
        return "  " + cells.joined(separator: "  ")
    }
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
