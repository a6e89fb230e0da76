import FoundationEssentials
import MigrationModel

/// An assessment as one HTML page that loads nothing from anywhere and works offline. Summary and charts are in the
/// page itself; rows are made by its script, as text and never as markup, a hundred at a time.
package struct Page {
    private let assessment: Assessment
    private let title: String
    private let date: String

    /// - Parameter date: for people.
    package init(_ assessment: Assessment, title: String, date: String) {
        self.assessment = assessment
        self.title = title
        self.date = date
    }

    package func html() throws -> String {
        let summary = assessment.summary
        let total = summary.ready + summary.warning + summary.blocked
        let hosts =
            assessment.hosts.isEmpty
            ? "No host was looked at: which target takes a GPU or a disk is left open."
            : "Judged for \(assessment.hosts.count == 1 ? "host" : "\(assessment.hosts.count) hosts") "
                + assessment.hosts.prefix(12).joined(separator: ", ") + (assessment.hosts.count > 12 ? ", …" : "") + "."
        return """
            <!DOCTYPE html>
            <html lang="en">
            <head>
            <meta charset="utf-8">
            <meta name="viewport" content="width=device-width, initial-scale=1">
            <meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
            <title>\(escaped(title))</title>
            <style>\(PageParts.style)</style>
            </head>
            <body>
            <header><h1>\(escaped(title))</h1><p>\(escaped(date)) · flotilla \(escaped(version)) · \(escaped(hosts))</p></header>
            <main>
            <section class="cards" aria-label="Summary">
            \(card("ready", "\(summary.ready)", "ready"))
            \(card("warning", "\(summary.warning)", "with warnings"))
            \(card("blocked", "\(summary.blocked)", "blocked"))
            \(card("", "\(total)", total == 1 ? "VM" : "VMs"))
            \(card("", byteText(summary.diskBytes), "of disks"))
            \(card("", byteText(summary.memoryBytes), "of memory"))
            \(card("", "\(summary.gpus)", summary.gpus == 1 ? "GPU" : "GPUs"))
            </section>
            \(share(summary, total))
            <section class="charts">
            \(Chart.diskSizes(assessment.vms.flatMap(\.diskBytes)))
            \(Chart.gpus(assessment.demand, hosts: !assessment.hosts.isEmpty))
            \(Chart.reasons(assessment.vms))
            </section>
            <section aria-label="Virtual machines">
            <form class="filters" onsubmit="return false">
            <fieldset><legend>Status</legend>
            \(["ready", "warning", "blocked"].map {
                "<label><input type=\"checkbox\" name=\"status\" value=\"\($0)\" checked> \($0)</label>"
            }.joined(separator: "\n"))
            </fieldset>
            <label><input type="checkbox" id="gpu"> with GPU only</label>
            <label class="search">Search <input type="search" id="search" placeholder="name, network, reason …"></label>
            <output id="count" aria-live="polite"></output>
            </form>
            <div class="scroll"><table><thead><tr>
            <th scope="col" aria-sort="none"><button type="button" data-key="verdict">Status</button></th>
            <th scope="col" aria-sort="none"><button type="button" data-key="name">VM</button></th>
            <th scope="col" aria-sort="none" class="number"><button type="button" data-key="cpus">CPUs</button></th>
            <th scope="col" aria-sort="none" class="number"><button type="button" data-key="memory">Memory</button></th>
            <th scope="col" aria-sort="none" class="number"><button type="button" data-key="disks">Disks</button></th>
            <th scope="col">GPUs and devices</th><th scope="col">Findings and what to do</th>
            </tr></thead><tbody id="rows"></tbody></table></div>
            <noscript><p>The table needs JavaScript; <code>flotilla assess</code> prints it without.</p></noscript>
            <p><button type="button" id="more" hidden>Show more</button></p>
            </section>
            </main>
            <script type="application/json" id="data">\(try data())</script>
            <script>\(PageParts.script)</script>
            </body>
            </html>

            """
    }

    private func card(_ kind: String, _ value: String, _ label: String) -> String {
        "<div class=\"card \(kind)\"><b>\(escaped(value))</b><span>\(escaped(label))</span></div>"
    }

    private func share(_ summary: Assessment.Summary, _ total: Int) -> String {
        guard total > 0 else { return "" }
        let parts = [("ready", summary.ready), ("warning", summary.warning), ("blocked", summary.blocked)]
        let text = parts.map { "\($1) \($0)" }.joined(separator: ", ")
        let bars = parts.filter { $1 > 0 }.map { "<i class=\"\($0)\" style=\"flex:\($1)\"></i>" }.joined()
        return "<div class=\"share\" role=\"img\" aria-label=\"\(text)\">\(bars)</div>"
    }

    /// Reasons that many VMs share are there once.
    private func data() throws -> String {
        struct Row: Encodable {
            var n: String, v: Int, c: UInt32, m: UInt64, d: [UInt64], g: [[String]], r: [Int], w: [String], h: [String]
            var i: [String], u: Int
        }
        var reasons: [[String]] = []
        var places: [[String]: Int] = [:]
        let several = assessment.isOfSeveralDatacenters
        let rows = assessment.vms.map { vm in
            Row(
                n: vm.name, v: Assessment.Verdict.allCases.firstIndex(of: vm.verdict) ?? 0, c: vm.cpus,
                m: vm.memoryBytes, d: vm.diskBytes,
                g: vm.devices.map { device in
                    [
                        device.id, device.kindText, device.name,
                        device.fits.prefix(20).map { "\($0.host) \($0.functions.joined(separator: " "))" }
                            .joined(separator: ", "),
                    ]
                },
                r: vm.reasons.map { reason in
                    let text = [reason.severity.rawValue, reason.message, reason.remedy]
                    if let place = places[text] { return place }
                    places[text] = reasons.count
                    reasons.append(text)
                    return reasons.count - 1
                }, w: vm.networks, h: Array(vm.hosts.prefix(20)),
                i: [vm.guest, vm.firmware, vm.power, several ? vm.datacenter : "", vm.source],
                u: vm.devices.count(where: \.isGPU))
        }
        struct Data: Encodable {
            var reasons: [[String]], rows: [Row], judged: Bool
        }
        let json = try JSONEncoder().encode(Data(reasons: reasons, rows: rows, judged: !assessment.hosts.isEmpty))
        return String(decoding: json, as: UTF8.self).replacing("<", with: "\\u003c")
    }
}

func escaped(_ text: String) -> String {
    var out = ""
    for scalar in text.unicodeScalars {
        switch scalar {
        case "&": out += "&amp;"
        case "<": out += "&lt;"
        case ">": out += "&gt;"
        case "\"": out += "&quot;"
        case "'": out += "&#39;"
        default: out.unicodeScalars.append(scalar)
        }
    }
    return out
}
