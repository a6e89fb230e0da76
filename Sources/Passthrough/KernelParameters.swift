import MigrationModel

/// Edits of kernel command lines in the boot loaders' own files. Texts in, texts out.
struct KernelParameters {
    /// "intel_iommu=on iommu=pt" as words.
    let wanted: [String]
    /// Words that would undo them.
    private static let opposed: Set<String> = ["intel_iommu=off", "amd_iommu=off", "iommu=off", "intel_iommu=igfx_off"]

    /// AMD's driver is on as soon as the firmware offers an IOMMU, and so are Arm's, whose kernel does not know `iommu=`
    /// (kernel: admin-guide/kernel-parameters.txt).
    init(amd: Bool, arm: Bool = false) {
        wanted = arm ? ["iommu.passthrough=1"] : amd ? ["iommu=pt"] : ["intel_iommu=on", "iommu=pt"]
    }

    /// What of a command line the kernel reads: all before a word "--", behind which everything is init's.
    static func ofKernel(_ line: Substring) -> Substring {
        var (start, index, isQuoted) = (line.startIndex, line.startIndex, false)
        while index < line.endIndex {
            let character = line[index]
            if character == "\"" { isQuoted.toggle() }
            let next = line.index(after: index)
            if !isQuoted, [" ", "\t", "\n"].contains(character) {
                if line[start..<index] == "--" { return line[..<start] }
                start = next
            }
            index = next
        }
        return line[start...] == "--" ? line[..<start] : line
    }

    static func isEnded(_ line: Substring) -> Bool { ofKernel(line).endIndex != line.endIndex }

    /// A command line with all wanted words; the same text when it has them.
    func edited(_ line: String) -> String {
        let own = Self.ofKernel(line[...])
        guard own.endIndex == line.endIndex else {
            let new = edited(String(own))
            return new == own ? line : "\(new) \(line[own.endIndex...])"
        }
        let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).map(String.init)
        let missing = wanted.filter { !words.contains($0) }
        let opposed = words.filter(Self.opposed.contains)
        if missing.isEmpty && opposed.isEmpty { return line }
        let kept = opposed.isEmpty ? line : words.filter { !Self.opposed.contains($0) }.joined(separator: " ")
        let end = kept.reversed().prefix { $0 == " " || $0 == "\t" }.count
        let stem = String(kept.dropLast(end))
        return stem.isEmpty ? missing.joined(separator: " ") : ([stem] + missing).joined(separator: " ")
    }

    /// A file that holds nothing but a command line, as /etc/kernel/cmdline: in one line or several, with comments.
    func edited(file text: String) -> String {
        var lines = text.split(omittingEmptySubsequences: false) { $0 == "\n" || $0 == "\r\n" }.map(String.init)
        let own = lines.indices.filter { lines[$0].contains { $0 != " " && $0 != "\t" } && !lines[$0].hasPrefix("#") }
        guard edited(own.map { lines[$0] }.joined(separator: " ")) != own.map({ lines[$0] }).joined(separator: " ")
        else { return text }
        guard let last = own.first(where: { Self.isEnded(lines[$0][...]) }) ?? own.last else {
            let comments = lines.filter { $0.hasPrefix("#") }
            return Self.joined(comments + [wanted.joined(separator: " "), ""], as: text)
        }
        for index in own where index < last { lines[index] = KernelParameters(wanted: []).edited(lines[index]) }
        let before = own.filter { $0 < last }.flatMap { lines[$0].split { $0 == " " || $0 == "\t" } }
        let missing = KernelParameters(wanted: wanted.filter { !before.contains(Substring($0)) })
        lines[last] = missing.edited(lines[last])
        if lines.last != "" { lines.append("") }
        return Self.joined(lines, as: text)
    }

    /// A Boot Loader Specification entry (uapi-group.org): words of all its `options` lines are joined by the loader.
    func edited(entry text: String) -> String {
        var lines = text.split(omittingEmptySubsequences: false) { $0 == "\n" || $0 == "\r\n" }.map(String.init)
        let options = lines.indices.filter { Self.value(of: "options", in: lines[$0]) != nil }
        // Windows and memory tests take such words as their own options. A unified image has its kernel's line within.
        guard lines.contains(where: { Self.value(of: "linux", in: $0) != nil }) else { return text }
        let all = options.compactMap { Self.value(of: "options", in: lines[$0]) }.joined(separator: " ")
        guard edited(all) != all else { return text }
        // Those behind the "--" are not the kernel's.
        let ending = options.first { Self.value(of: "options", in: lines[$0]).map(Self.isEnded) ?? false }
        guard let last = ending ?? options.last else {
            if lines.last == "" { lines.removeLast() }
            return Self.joined(lines + ["options \(wanted.joined(separator: " "))", ""], as: text)
        }
        for index in options where index <= last {
            guard let words = Self.value(of: "options", in: lines[index]) else { continue }
            let head = String(lines[index].dropLast(words.count))
            if index == last {
                let elsewhere = options.filter { $0 < last }.flatMap { lines[$0].split(separator: " ") }
                let missing = KernelParameters(wanted: wanted.filter { !elsewhere.contains(Substring($0)) })
                lines[index] = head + missing.edited(String(words))
            } else {
                lines[index] = head + KernelParameters(wanted: []).edited(String(words))
            }
        }
        return Self.joined(lines, as: text)
    }

    /// Lines that end as those of the text; more than it had end as its first.
    private static func joined(_ lines: [String], as text: String) -> String {
        let ends = text.filter { $0 == "\n" || $0 == "\r\n" }.map(String.init)
        return lines.enumerated().map { index, line in
            index == lines.count - 1 ? line : line + (index < ends.count ? ends[index] : ends.first ?? "\n")
        }.joined()
    }

    /// What an entry's line says of a key; nil when it is of another. Blanks before the key count for nothing.
    private static func value(of key: String, in line: some StringProtocol) -> Substring? {
        let rest = Substring(line).drop { $0 == " " || $0 == "\t" }
        guard rest.hasPrefix(key), let blank = rest.dropFirst(key.count).first, blank == " " || blank == "\t" else {
            return nil
        }
        return rest.dropFirst(key.count + 1)
    }

    /// The kernel's command line of an entry; nil when it has none.
    func options(ofEntry text: String) -> String? {
        let lines = text.split(whereSeparator: \.isNewline)
        guard lines.contains(where: { Self.value(of: "linux", in: $0) != nil }) else { return nil }
        let words = lines.compactMap { Self.value(of: "options", in: $0) }
            .flatMap { $0.split { $0 == " " || $0 == "\t" } }
        return words.isEmpty ? nil : words.joined(separator: " ")
    }

    /// Whether an entry's options have any word that is wanted on some host.
    static func areSome(inEntry text: String) -> Bool {
        let all = Set(KernelParameters(amd: false).wanted + KernelParameters(amd: false, arm: true).wanted)
        return text.split(whereSeparator: \.isNewline).contains { line in
            let words = line.split { $0 == " " || $0 == "\t" }
            return words.first == "options" && words.contains { all.contains(String($0)) }
        }
    }

    private init(wanted: [String]) { self.wanted = wanted }

    /// /etc/default/grub, which is shell: the last plain assignment of GRUB_CMDLINE_LINUX, or one that adds to it. Nil when a
    /// command line is set in another way: then nobody but its author knows what it means.
    func edited(grub text: String) -> String? {
        var lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        let found = lines.map { GRUBAssignment($0[...]) }
        guard found.allSatisfy({ $0?.isOdd != true }) else { return nil }
        if isMet(by: grubWords([text])) { return text }
        let last = found.lastIndex { $0?.name == GRUBAssignment.names[0] }
        for index in lines.indices {
            guard let name = found[index]?.name, let (quote, value, rest) = found[index]?.content else { continue }
            let new = (index == last ? self : KernelParameters(wanted: [])).edited(value)
            let mark = quote.isEmpty ? "\"" : quote
            if new != value { lines[index] = "\(name)=\(mark)\(new)\(mark)\(rest)" }
        }
        if last == nil {
            if lines.last == "" { lines.removeLast() }
            // It may be set in a way that is not seen here, and must not be lost.
            let name = GRUBAssignment.names[0]
            lines += ["\(name)=\"$\(name) \(wanted.joined(separator: " "))\"", ""]
        }
        return lines.joined(separator: "\n")
    }

    /// Words of GRUB's command lines after a shell has read these files in their order. Of odd lines only what would
    /// undo the wanted words.
    func grubWords(_ texts: [String]) -> Set<String> {
        var words: [String: Set<String>] = [:]
        var ended: Set<String> = []
        var undoing: Set<String> = []
        for line in texts.flatMap(Self.lines(ofShell:)) {
            guard let found = GRUBAssignment(line[...]) else { continue }
            if !found.appends {
                words[found.name] = []
                ended.remove(found.name)
            }
            if let value = found.content?.value, !found.isOdd {
                if ended.contains(found.name) { continue }
                let own = Self.ofKernel(value[...])
                words[found.name, default: []].formUnion(own.split { $0 == " " || $0 == "\t" }.map(String.init))
                if Self.isEnded(value[...]) { ended.insert(found.name) }
            } else {
                let all = found.right.split { " \t\"'`;\\".contains($0) }.map(String.init)
                undoing.formUnion(all.filter(Self.opposed.contains))
            }
        }
        // That of each kernel comes before the default's.
        if ended.contains(GRUBAssignment.names[0]) { words[GRUBAssignment.names[1]] = nil }
        return words.values.reduce(undoing) { $0.union($1) }
    }

    /// Lines of shell; what sets a command line in several, joined by backslashes, is one.
    private static func lines(ofShell text: String) -> [String] {
        var lines: [String] = []
        for line in text.split(whereSeparator: \.isNewline) {
            if let last = lines.last, last.hasSuffix("\\"), GRUBAssignment(last[...]) != nil {
                lines[lines.count - 1] = "\(last.dropLast())\(line)"
            } else {
                lines.append(String(line))
            }
        }
        return lines
    }

    /// Whether words that are added to GRUB_CMDLINE_LINUX after these files would be init's.
    func isEnded(_ texts: [String]) -> Bool {
        let name = GRUBAssignment.names[0]
        return !grubWords(texts + ["\(name)=\"$\(name) flotilla.probe\""]).contains("flotilla.probe")
    }

    /// Titles of entries of a grub.cfg that its script for Linux (10_linux, 10_linux_zfs) made without the words. Those for
    /// recovery have a line of their own, and others' kernels, which os-prober found, too. With blscfg there are none here.
    func entriesWithout(inGRUB text: String) -> [String] {
        var (isOurs, entry) = (false, "")
        var found: [String] = []
        for line in text.split(separator: "\n") {
            if line.hasPrefix("### BEGIN ") || line.hasPrefix("### END ") {
                isOurs = line.hasPrefix("### BEGIN ") && line.contains("_linux")
            }
            let words = Self.ofKernel(line).split { $0 == " " || $0 == "\t" }.map(String.init)
            if words.first == "menuentry" { entry = String(line) }
            guard isOurs, ["linux", "linux16", "linuxefi"].contains(words.first), !entry.contains("-recovery-"),
                !isMet(by: Set(words))
            else { continue }
            let parts = entry.split(separator: "'", omittingEmptySubsequences: false)
            found.append(parts.count > 2 ? String(parts[1]) : words.dropFirst().joined(separator: " "))
        }
        return found
    }

    func isOpposed(_ words: Set<String>) -> Bool { words.contains(where: Self.opposed.contains) }

    func isMet(by words: Set<String>) -> Bool { wanted.allSatisfy(words.contains) && !isOpposed(words) }

    /// A line of shell that sets one of GRUB's command lines.
    private struct GRUBAssignment {
        static let names = ["GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT"]

        let name: String
        /// What is behind the equals sign.
        let right: Substring
        /// Nil when that is not a plain string.
        let content: (quote: String, value: String, comment: String)?
        /// Whether the variable keeps what it had.
        let appends: Bool
        /// Anything but an unindented `name=value`.
        let isOdd: Bool

        init?(_ line: Substring) {
            func unindented(_ text: Substring) -> Substring { text.drop { $0 == " " || $0 == "\t" } }
            var rest = unindented(line)
            if rest.hasPrefix("export ") || rest.hasPrefix("export\t") { rest = unindented(rest.dropFirst(7)) }
            let name = String(rest.prefix { $0 != "=" && $0 != "+" })
            let sign = rest.dropFirst(name.count).hasPrefix("+=") ? "+=" : "="
            guard Self.names.contains(name), rest.hasPrefix(name + sign) else { return nil }
            self.name = name
            right = rest.dropFirst(name.count + sign.count)
            content = KernelParameters.value(of: right)
            isOdd = content == nil || !line.hasPrefix(name + "=")
            let expanded = content?.quote == "\"" ? content?.value ?? "" : ""
            let parts = expanded.split(separator: "$", omittingEmptySubsequences: false).dropFirst()
            let namesItself = parts.contains { part in
                part.hasPrefix("{\(name)}") || part.prefix { $0.isLetter || $0.isNumber || $0 == "_" } == name
            }
            appends = sign == "+=" || namesItself
        }
    }

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
