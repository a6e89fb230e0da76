/// The difference of two small texts as `diff -u` prints it, three lines of context. Empty when they are the same.
///
/// - Parameter before: nil: the file is new. `after`: nil: it goes.
package func unifiedDiff(_ path: String, before: [UInt8]?, after: [UInt8]?) -> String {
    guard before != after else { return "" }
    let (old, new) = (lines(before), lines(after))
    let difference = new.difference(from: old)
    var removed: Set<Int> = []
    var inserted: Set<Int> = []
    for change in difference {
        switch change {
        case .remove(let offset, _, _): removed.insert(offset)
        case .insert(let offset, _, _): inserted.insert(offset)
        }
    }
    // Every line of both once, with its mark and its number in each before it.
    var all: [(mark: Character, text: String, old: Int, new: Int)] = []
    var (i, j) = (0, 0)
    while i < old.count || j < new.count {
        if i < old.count, removed.contains(i) {
            all.append(("-", old[i], i, j))
            i += 1
        } else if j < new.count, inserted.contains(j) {
            all.append(("+", new[j], i, j))
            j += 1
        } else {
            all.append((" ", old[i], i, j))
            (i, j) = (i + 1, j + 1)
        }
    }
    var output = "--- \(before == nil ? "/dev/null" : path)\n+++ \(after == nil ? "/dev/null" : path)\n"
    let changed = all.indices.filter { all[$0].mark != " " }
    var next = 0
    while next < changed.count {
        let start = max(0, changed[next] - 3)
        var end = changed[next]
        while next < changed.count, changed[next] <= end + 6 {
            end = changed[next]
            next += 1
        }
        let hunk = all[start...min(end + 3, all.count - 1)]
        let (olds, news) = (hunk.filter { $0.mark != "+" }.count, hunk.filter { $0.mark != "-" }.count)
        let (first, second) = (hunk[start].old + (olds == 0 ? 0 : 1), hunk[start].new + (news == 0 ? 0 : 1))
        output += "@@ -\(first)\(olds == 1 ? "" : ",\(olds)") +\(second)\(news == 1 ? "" : ",\(news)") @@\n"
        for line in hunk {
            output += "\(line.mark)\(line.text)"
            if line.text.utf8.last != 0x0a { output += "\n\\ No newline at end of file\n" }
        }
    }
    return output
}

/// With their line ends.
private func lines(_ bytes: [UInt8]?) -> [String] {
    guard let bytes, !bytes.isEmpty else { return [] }
    // By bytes: "\r\n" is one character.
    var lines = bytes.split(separator: 0x0a, omittingEmptySubsequences: false).map {
        String(decoding: $0, as: UTF8.self)
    }
    let last = lines.removeLast()
    return lines.map { $0 + "\n" } + (last.isEmpty ? [] : [last])
}
