/// Up to three of the names that somebody who wrote `wanted` may have meant, the likeliest first: such that differ by
/// a few letters, or only by case, or begin with it.
func nearest(to wanted: String, among names: [String]) -> [String] {
    let sought = Array(wanted.lowercased().utf16.prefix(100))
    let limit = max(2, sought.count / 3)
    var found: [(distance: Int, name: String)] = []
    for name in Set(names) {
        let letters = Array(name.lowercased().utf16.prefix(100))
        if abs(letters.count - sought.count) <= limit {
            let distance = edits(from: sought, to: letters)
            if distance <= limit { found.append((distance, name)) }
        } else if sought.count > 2, letters.starts(with: sought) {
            found.append((limit, name))
        }
    }
    return found.sorted { ($0.distance, $0.name) < ($1.distance, $1.name) }.prefix(3).map(\.name)
}

/// Levenshtein's distance.
private func edits(from one: [UInt16], to other: [UInt16]) -> Int {
    var row = Array(0...other.count)
    for (index, letter) in one.enumerated() {
        var diagonal = row[0]
        row[0] = index + 1
        for (place, wanted) in other.enumerated() {
            let kept = letter == wanted ? diagonal : diagonal + 1
            diagonal = row[place + 1]
            row[place + 1] = min(kept, row[place] + 1, diagonal + 1)
        }
    }
    return row[other.count]
}
