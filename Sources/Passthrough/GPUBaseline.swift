import FoundationEssentials
import HostKit
import MigrationModel

/// What a benchmark gave on this host's bare metal, and how to ask a guest for the same: `flotilla gpu baseline record`.
/// A migration names a baseline only; what runs in the guest is what the host's administrator recorded.
package struct GPUBaseline: Sendable, Codable, Hashable {
    /// Which figures are good.
    package enum Better: String, Sendable, Codable, CaseIterable {
        case higher, lower
    }

    package var name: String
    /// The program and its arguments. Runs as it is, without a shell.
    package var command: [String]
    /// Regular expression that finds the figure in the output: its first group, or all of it. Without one the output's
    /// last number counts.
    package var pattern: String?
    package var better: Better
    /// One for each run, in the benchmark's own unit.
    package var figures: [Double]
    /// Vendor and device id of the GPU that was measured, "10de:20f1".
    package var gpu: String?
    /// How many seconds a run may take, here and in the guest.
    package var limit: Int
    /// Seconds since 1970.
    package var recorded: Int64

    package init(
        name: String, command: [String], pattern: String? = nil, better: Better = .higher, figures: [Double] = [],
        gpu: String? = nil, limit: Int = 600, recorded: Int64 = 0
    ) {
        self.name = name
        self.command = command
        self.pattern = pattern
        self.better = better
        self.figures = figures
        self.gpu = gpu
        self.limit = limit
        self.recorded = recorded
    }

    /// The median of all runs.
    package var figure: Double { median(figures) }

    /// Throws `invalidArgument` for what could not be measured or stored.
    package func validate() throws {
        try Self.validate(name: name)
        guard let program = command.first, !program.isEmpty, !command.contains(where: { $0.contains("\0") }) else {
            throw MigrationError(.invalidArgument, "baseline \(name) has no command", hint: "name it after --")
        }
        if let pattern { _ = try expression(pattern) }
    }

    /// The rules are those of a domain's name: it becomes a file's.
    package static func validate(name: String) throws {
        guard isValidDomainName(name) else {
            throw MigrationError(
                .invalidArgument, "\"\(name.prefix(80))\" can't be a baseline's name",
                hint: "use at most 64 letters, digits, '-', '_', '+' and '.', a letter or digit at both ends")
        }
    }

    /// The figure in a run's output.
    ///
    /// - Throws: `failedPrecondition` with the end of the output when there is none, or it is not above zero.
    package func figure(in output: String) throws -> Double {
        var found: Substring?
        if let pattern {
            if let match = try expression(pattern).firstMatch(in: output) {
                found = match.output.count > 1 ? match.output[1].substring : match.output[0].substring
                // "1" of "1,234.5".
                if let found, let after = output[found.endIndex...].first, ",.'".contains(after),
                    output[found.endIndex...].dropFirst().first?.isNumber == true
                {
                    throw MigrationError(
                        .failedPrecondition,
                        "benchmark \(name): \"\(pattern)\" finds \(found), which may be only a part of a figure: a \(after) and "
                            + "a digit follow",
                        hint: "let the pattern take the whole figure, and have it printed without separators")
                }
            }
        } else {
            let last = output.matches(of: /[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?/).last?.output
            // A part of "1,234.5" or "-5" is another figure.
            if let last, let before = output[..<last.startIndex].last, "-,.'".contains(before) {
                throw MigrationError(
                    .failedPrecondition,
                    "benchmark \(name) printed \(output[..<last.endIndex].suffix(40).split(whereSeparator: \.isWhitespace).last ?? last), "
                        + "of which \(last) may be only a part",
                    hint: "say with --pattern which figure counts, or have it printed without separators and signs")
            }
            found = last
        }
        guard let found, let value = Double(found), value.isFinite, value > 0 else {
            let end = output.split(whereSeparator: \.isNewline).suffix(3).joined(separator: " | ").suffix(300)
            throw MigrationError(
                .failedPrecondition,
                "benchmark \(name) printed no figure above 0" + (pattern.map { " that matches \"\($0)\"" } ?? "")
                    + (end.isEmpty ? "; it printed nothing" : "; its output ends in: \(end)"))
        }
        return value
    }

    /// By how many percent of the baseline a figure is worse; negative when it is better.
    package func loss(of other: Double) -> Double {
        let difference = better == .higher ? figure - other : other - figure
        return difference / figure * 100
    }

    private func expression(_ pattern: String) throws -> Regex<AnyRegexOutput> {
        do { return try Regex(pattern).anchorsMatchLineEndings() } catch {
            throw MigrationError(.invalidArgument, "\"\(pattern)\" is not a regular expression: \(error)")
        }
    }
}

package func median(_ figures: [Double]) -> Double {
    let sorted = figures.sorted()
    guard let upper = sorted.dropFirst(sorted.count / 2).first else { return 0 }
    return sorted.count % 2 == 1 ? upper : (sorted[sorted.count / 2 - 1] + upper) / 2
}

/// The host's baselines, a JSON file each.
package struct GPUBaselines: Sendable {
    let folder: String

    /// - Parameter folder: the one of the GPU ledger.
    package init(folder: String = GPULedger.folder) { self.folder = "\(folder)/baselines" }

    package func path(of name: String) -> String { "\(folder)/\(name).json" }

    /// Stores it in place of an older one of that name.
    package func save(_ baseline: GPUBaseline) throws {
        try baseline.validate()
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try Files.createDirectories(folder)
        try Files.writeAtomically([UInt8](encoder.encode(baseline)), to: path(of: baseline.name))
    }

    /// - Throws: `notFound` when the host has none of that name, `dataLoss` when it can't be read.
    package func read(_ name: String) throws -> GPUBaseline {
        try GPUBaseline.validate(name: name)
        let path = path(of: name)
        guard Files.exists(path) else {
            throw MigrationError(
                .notFound, "this host has no GPU baseline \(name)",
                hint: "record it here, with the GPU on its own driver: flotilla gpu baseline record \(name) -- COMMAND")
        }
        guard let baseline = try? JSONDecoder().decode(GPUBaseline.self, from: Data(Files.read(path, limit: 1 << 20))),
            baseline.name == name, !baseline.figures.isEmpty, baseline.figure > 0, (try? baseline.validate()) != nil
        else {
            throw MigrationError(
                .dataLoss, "the GPU baseline \(path) is damaged",
                hint: "record it again, or forget it: flotilla gpu baseline remove \(name)")
        }
        return baseline
    }

    /// All of them, by name.
    package func all() throws -> [GPUBaseline] {
        guard Files.isDirectory(folder) else { return [] }
        return try Files.list(folder).filter { $0.hasSuffix(".json") }.sorted().map {
            try read(String($0.dropLast(5)))
        }
    }

    /// Also one that is damaged.
    package func remove(_ name: String) throws {
        do { _ = try read(name) } catch let error as MigrationError where error.code == .dataLoss {}
        try Files.remove(path(of: name))
    }
}
