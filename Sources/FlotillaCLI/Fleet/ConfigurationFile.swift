import HostKit
import MigrationModel
import Yams

/// A mapping of a YAML file, read strictly: a key that is no setting is an error, so that a misspelt one does not
/// silently leave a default in place. Every error names the file, the line and the key.
struct ConfigurationSection {
    private let path: String
    private let name: String
    private let values: [String: Node]
    private let settings: [String]

    /// Reads a whole file.
    ///
    /// - Parameter settings: all that there are, with those of a section, or of a list of sections, as "section.setting". Told
    ///   of before anything that is missing: what is misspelt is missing, too.
    init(path: String, _ settings: [String]) throws {
        let text = String(decoding: try Files.read(path, limit: 1 << 20), as: UTF8.self)
        let root: Node?
        do { root = try Yams.compose(yaml: text) } catch {
            throw MigrationError(.invalidArgument, "\(path) is not valid YAML: \(error)")
        }
        try self.init(path, "", root ?? Node([(Node, Node)]()), settings)
        try requireKnown()
    }

    private init(_ path: String, _ name: String, _ node: Node, _ settings: [String]) throws {
        self.path = path
        self.name = name
        self.settings = settings
        guard let mapping = node.mapping else {
            throw MigrationError(
                .invalidArgument, "\(path):\(node.mark?.line ?? 0): \(name) has to be a list of 'key: value'")
        }
        var values: [String: Node] = [:]
        for (key, value) in mapping {
            guard let key = key.string else { continue }
            values[key] = value
        }
        self.values = values
    }

    /// Throws for the first key of this section, or of one below it, that is no setting.
    private func requireKnown() throws {
        for (key, value) in values.sorted(by: { $0.key < $1.key }) {
            let below = settings.filter { $0.hasPrefix("\(full(key)).") }
            if below.isEmpty {
                guard settings.contains(full(key)) else {
                    let here = settings.filter { $0.hasPrefix(full("")) }.map { $0.dropFirst(full("").count) }
                    let names = Set(here.map { String($0.prefix { $0 != "." }) }).sorted()
                    throw problem(
                        key, "is not a setting", hint: "settings here are \(names.joined(separator: ", "))")
                }
            } else if value.mapping != nil || value.sequence != nil {
                for node in value.sequence.map({ Array($0) }) ?? [value] {
                    try ConfigurationSection(path, full(key), node, settings).requireKnown()
                }
            }
        }
    }

    func has(_ key: String) -> Bool { value(key) != nil }

    func text(_ key: String) throws -> String {
        guard let value = value(key) else { throw missing(key) }
        guard let text = value.string, !text.isEmpty else { throw problem(key, "has to be a text") }
        return text
    }

    func text(_ key: String, default fallback: String) throws -> String {
        try has(key) ? text(key) : fallback
    }

    func number(_ key: String, default fallback: Int, in range: ClosedRange<Int>) throws -> Int {
        guard let value = value(key) else { return fallback }
        guard let number = value.int, range.contains(number) else {
            throw problem(key, "has to be a number from \(range.lowerBound) to \(range.upperBound)")
        }
        return number
    }

    func flag(_ key: String, default fallback: Bool) throws -> Bool {
        guard let value = value(key) else { return fallback }
        guard let flag = value.bool else { throw problem(key, "has to be true or false") }
        return flag
    }

    /// "500ms", "10s", "5m", "2h".
    func duration(_ key: String, default fallback: Duration) throws -> Duration {
        guard let value = value(key) else { return fallback }
        let text = value.string ?? ""
        let units: [(String, Duration)] = [
            ("ms", .milliseconds(1)), ("s", .seconds(1)), ("m", .seconds(60)), ("h", .seconds(3600)),
        ]
        for (suffix, unit) in units where text.hasSuffix(suffix) {
            if let count = Int32(text.dropLast(suffix.count)), count > 0 { return unit * Int(count) }
        }
        throw problem(key, "has to be a duration such as 500ms, 10s, 5m or 2h")
    }

    /// "100M" bytes; nil when it isn't set.
    func bytes(_ key: String) throws -> UInt64? {
        guard let value = value(key) else { return nil }
        guard let count = ByteCountArgument(argument: value.string ?? "") else {
            throw problem(key, "has to be a number of bytes such as 500M or 2G")
        }
        return count.bytes
    }

    func texts(_ key: String) throws -> [String] {
        guard let value = value(key) else { return [] }
        guard let items = value.sequence, items.allSatisfy({ $0.string != nil }) else {
            throw problem(key, "has to be a list of texts")
        }
        return items.compactMap(\.string)
    }

    func section(_ key: String) throws -> ConfigurationSection {
        guard let value = value(key) else { throw missing(key) }
        return try ConfigurationSection(path, full(key), value, settings)
    }

    func sections(_ key: String) throws -> [ConfigurationSection] {
        guard let value = value(key) else { return [] }
        guard let items = value.sequence else { throw problem(key, "has to be a list") }
        return try items.map { try ConfigurationSection(path, full(key), $0, settings) }
    }

    private func value(_ key: String) -> Node? {
        precondition(settings.contains { $0 == full(key) || $0.hasPrefix("\(full(key)).") }, "\(full(key)) is unknown")
        return values[key]
    }

    /// With an empty key, what those of this section begin with.
    private func full(_ key: String) -> String { name.isEmpty ? key : "\(name).\(key)" }

    private func missing(_ key: String) -> MigrationError {
        MigrationError(.invalidArgument, "\(path): setting \(full(key)) is missing")
    }

    func problem(_ key: String, _ text: String, hint: String? = nil) -> MigrationError {
        MigrationError(
            .invalidArgument, "\(path):\(values[key]?.mark?.line ?? 0): \(full(key)) \(text)", hint: hint)
    }
}
