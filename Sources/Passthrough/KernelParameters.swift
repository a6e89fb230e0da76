import MigrationModel

/// Edits of kernel command lines in the boot loaders' own files. Texts in, texts out.
struct KernelParameters {
    /// "intel_iommu=on iommu=pt" as words.
    let wanted: [String]
    /// Words that would undo them.
    private static let opposed: Set<String> = ["intel_iommu=off", "amd_iommu=off", "iommu=off", "intel_iommu=igfx_off"]

    /// AMD's driver is on as soon as the firmware offers an IOMMU.
    init(amd: Bool) { wanted = amd ? ["iommu=pt"] : ["intel_iommu=on", "iommu=pt"] }

    /// A command line with all wanted words; the same text when it has them.
    func edited(_ line: String) -> String {
        let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).map(String.init)
        let missing = wanted.filter { !words.contains($0) }
        let opposed = words.filter(Self.opposed.contains)
        if missing.isEmpty && opposed.isEmpty { return line }
        let kept = opposed.isEmpty ? line : words.filter { !Self.opposed.contains($0) }.joined(separator: " ")
        let end = kept.reversed().prefix { $0 == " " || $0 == "\t" }.count
        let stem = String(kept.dropLast(end))
        return stem.isEmpty ? missing.joined(separator: " ") : ([stem] + missing).joined(separator: " ")
    }

    /// A Boot Loader Specification entry (uapi-group.org): words of all its `options` lines are joined by the loader.
    func edited(entry text: String) -> String {
        var lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        let options = lines.indices.filter { lines[$0].hasPrefix("options ") || lines[$0].hasPrefix("options\t") }
        let all = options.map { lines[$0].dropFirst(8) }.joined(separator: " ")
        guard edited(all) != all else { return text }
        guard let last = options.last else {
            if lines.last == "" { lines.removeLast() }
            return (lines + ["options \(wanted.joined(separator: " "))", ""]).joined(separator: "\n")
        }
        for index in options {
            let head = String(lines[index].prefix(8))
            let words = lines[index].dropFirst(8)
            if index == last {
                let elsewhere = options.dropLast().map { lines[$0] }.joined(separator: " ").split(separator: " ")
                let missing = KernelParameters(wanted: wanted.filter { !elsewhere.contains(Substring($0)) })
                lines[index] = head + missing.edited(String(words))
            } else {
                lines[index] = head + KernelParameters(wanted: []).edited(String(words))
            }
        }
        return lines.joined(separator: "\n")
    }

    private init(wanted: [String]) { self.wanted = wanted }

    /// /etc/default/grub, which is shell: the last plain assignment of GRUB_CMDLINE_LINUX, or a new one. Nil when the
    /// assignment is not a plain quoted string: then nobody but its author knows what it means.
    func edited(grub text: String) -> String? {
        var lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        let name = "GRUB_CMDLINE_LINUX="
        let effective = grubWords(text)
        if wanted.allSatisfy(effective.contains) && !effective.contains(where: Self.opposed.contains) { return text }
        for other in lines.indices where lines[other].hasPrefix("GRUB_CMDLINE_LINUX_DEFAULT=") {
            guard let (quote, value, rest) = Self.value(of: lines[other].dropFirst(27)) else { return nil }
            let clean = KernelParameters(wanted: []).edited(value)
            if clean != value { lines[other] = "GRUB_CMDLINE_LINUX_DEFAULT=\(quote)\(clean)\(quote)\(rest)" }
        }
        guard let index = lines.lastIndex(where: { $0.hasPrefix(name) }) else {
            if lines.last == "" { lines.removeLast() }
            return (lines + ["\(name)\"\(wanted.joined(separator: " "))\"", ""]).joined(separator: "\n")
        }
        guard let (quote, value, rest) = Self.value(of: lines[index].dropFirst(name.count)) else { return nil }
        let mark = quote.isEmpty ? "\"" : quote
        lines[index] = "\(name)\(mark)\(edited(value))\(mark)\(rest)"
        return lines.joined(separator: "\n")
    }

    /// Words of every plain assignment of a GRUB command line.
    func grubWords(_ text: String) -> Set<String> {
        var words: Set<String> = []
        for line in text.split(separator: "\n") {
            for name in ["GRUB_CMDLINE_LINUX=", "GRUB_CMDLINE_LINUX_DEFAULT="] where line.hasPrefix(name) {
                if let (_, value, _) = Self.value(of: line.dropFirst(name.count)) {
                    words.formUnion(value.split(separator: " ").map(String.init))
                }
            }
        }
        return words
    }

    func isOpposed(_ words: Set<String>) -> Bool { words.contains(where: Self.opposed.contains) }

    /// The content of a quoted string, or a single bare word, with nothing but a comment behind it.
    private static func value(of text: Substring) -> (quote: String, value: String, comment: String)? {
        let trimmed = text.reversed().drop { $0 == " " || $0 == "\t" }.reversed()
        guard let first = trimmed.first else { return ("", "", "") }
        guard first == "\"" || first == "'" else {
            return trimmed.contains { " \t\"'$`\\#;&|".contains($0) } ? nil : ("", String(trimmed), "")
        }
        let inner = trimmed.dropFirst()
        guard let end = inner.firstIndex(of: first) else { return nil }
        let rest = inner[inner.index(after: end)...]
        let behind = rest.drop { $0 == " " || $0 == "\t" }
        guard rest.isEmpty || behind.first == "#" && behind.count < rest.count else { return nil }
        let value = String(inner[..<end])
        return value.contains { $0 == "`" || $0 == "\\" } ? nil : (String(first), value, String(rest))
    }
}
