/// Horizontal bars as inline SVG, in the page's own colours.
enum Chart {
    static func diskSizes(_ sizes: [UInt64]) -> String {
        let bounds: [(String, UInt64)] = [
            ("up to 10 GiB", 10 << 30), ("to 50 GiB", 50 << 30), ("to 100 GiB", 100 << 30), ("to 500 GiB", 500 << 30),
            ("to 2 TiB", 2 << 40), ("larger", .max),
        ]
        var counts = [Int](repeating: 0, count: bounds.count)
        for size in sizes { counts[bounds.firstIndex { size <= $0.1 } ?? 0] += 1 }
        return chart("Disks by size", zip(bounds, counts).map { ($0.0, $1, "\($1)") }, empty: "no disks")
    }

    static func gpus(_ demand: [Assessment.Demand], hosts: Bool) -> String {
        let sorted = demand.sorted { ($1.wanted, $0.kind) < ($0.wanted, $1.kind) }
        var rows = sorted.prefix(8).map {
            ($0.kind, $0.wanted, hosts ? "\($0.wanted), hosts have \($0.free) free" : "\($0.wanted)")
        }
        let others = sorted.dropFirst(8)
        if !others.isEmpty {
            let wanted = others.reduce(0) { $0 + $1.wanted }
            rows.append(("\(others.count) other \(others.count == 1 ? "kind" : "kinds")", wanted, "\(wanted)"))
        }
        return chart("GPUs wanted, by kind", rows, empty: "no GPUs")
    }

    /// What stands in the way most often.
    static func reasons(_ vms: [Assessment.VM]) -> String {
        var counts: [String: Int] = [:]
        var texts: [String: Set<String>] = [:]
        for vm in vms {
            let remedies = vm.reasons.filter { $0.severity == .blocked }.map(\.remedy)
            for remedy in remedies where texts[generic(remedy)]?.count ?? 0 < 2 {
                texts[generic(remedy), default: []].insert(remedy)
            }
            for remedy in Set(remedies.map(generic)) { counts[remedy, default: 0] += 1 }
        }
        let rows = counts.sorted { ($1.value, $0.key) < ($0.value, $1.key) }.prefix(6)
            .map { key, count in
                let known = texts[key] ?? []
                return (known.count == 1 ? known.first ?? key : key, count, count == 1 ? "1 VM" : "\(count) VMs")
            }
        return chart("What would unblock most", Array(rows), empty: "nothing is blocked")
    }

    private static func generic(_ remedy: String) -> String {
        remedy.count <= 52 ? remedy : String(remedy.prefix(51)) + "…"
    }

    /// As wide as the chart, three at most.
    private static func lines(_ label: String) -> [String] {
        var lines = [""]
        for word in label.split(separator: " ") {
            let last = lines[lines.count - 1]
            if last.isEmpty || last.count + word.count < 56 {
                lines[lines.count - 1] += (last.isEmpty ? "" : " ") + String(word.prefix(56))
            } else if lines.count < 3 {
                lines.append(String(word.prefix(56)))
            } else {
                lines[2] += " …"
                break
            }
        }
        return lines
    }

    private static func chart(_ title: String, _ rows: [(String, Int, String)], empty: String) -> String {
        guard let most = rows.map(\.1).max(), most > 0 else {
            return "<figure><figcaption>\(title)</figcaption><p class=\"none\">\(empty)</p></figure>"
        }
        var y = 0
        var bars = ""
        for (label, count, text) in rows {
            for line in lines(label) {
                bars += "<text x=\"0\" y=\"\(y + 13)\">\(escaped(line))</text>"
                y += 16
            }
            y -= 16
            let width = count == 0 ? 0 : max(2, 210 * count / most)
            bars += """
                <rect x="0" y="\(y + 18)" width="\(width)" height="10" rx="2"/>\
                <text x="\(width + 6)" y="\(y + 27)" class="value">\(escaped(text))</text>
                """
            y += 38
        }
        let told = rows.map { "\($0.0): \($0.2)" }.joined(separator: "; ")
        return """
            <figure><figcaption>\(title)</figcaption>\
            <svg viewBox="0 0 400 \(y)" role="img" aria-label="\(escaped("\(title). \(told)"))">\(bars)</svg></figure>
            """
    }
}
