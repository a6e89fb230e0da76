import MigrationModel

/// Judges a tree by a JSON Schema of draft 7, as far as `protocol/schema` makes use of it: definitions, types, closed
/// objects, ranges, patterns, choices.
struct SchemaCheck {
    private let definitions: [String: JSONTree]
    private var patterns: [String: Regex<AnyRegexOutput>] = [:]
    private(set) var problems: [ManifestProblem] = []

    /// More are not told.
    private static let limit = 200

    init(definitions text: String) throws {
        guard case .object(let members) = try JSONTree(parsing: Array(text.utf8), name: "schema") else {
            throw MigrationError(.internal, "the manifest's schema is no object")
        }
        definitions = Dictionary(members.map { ($0.key, $0.value) }) { first, _ in first }
    }

    mutating func check(_ value: JSONTree, as definition: String) throws {
        guard let schema = definitions[definition] else {
            throw MigrationError(.internal, "the schema has no definition \(definition)")
        }
        try check(value, schema, "")
    }

    private mutating func report(_ path: String, _ message: String, _ remedy: String) {
        if problems.count < Self.limit { problems.append(ManifestProblem(path, message, remedy)) }
    }

    private mutating func check(_ value: JSONTree, _ schema: JSONTree, _ path: String) throws {
        if case .string(let reference)? = schema["$ref"] {
            guard let name = reference.split(separator: "/").last, let target = definitions[String(name)] else {
                throw MigrationError(.internal, "the schema has no \(reference)")
            }
            return try check(value, target, path)
        }
        if case .array(let parts)? = schema["allOf"] { for part in parts { try check(value, part, path) } }
        if case .array(let names)? = schema["not"]?["required"] {
            let keys = names.map(\.word)
            if keys.allSatisfy({ value[$0] != nil }) {
                report(path, "has both \(keys.joined(separator: " and "))", "leave one of them out")
            }
        }
        if case .array(let choices)? = schema["anyOf"] {
            for choice in choices {
                var trial = self
                trial.problems = []
                try trial.check(value, choice, path)
                if trial.problems.isEmpty { return }
            }
            return refuse(value, schema, path)
        }
        switch (schema["type"]?.word, value) {
        case (nil, _): break
        case ("object", .object(let members)): try check(members, schema, path)
        case ("array", .array(let items)):
            guard let element = schema["items"] else { return }
            for (index, item) in items.enumerated() { try check(item, element, "\(path)[\(index)]") }
        case ("boolean", .bool): break
        case ("string", .string(let text)): try check(text, schema, path)
        case ("integer", .number(let text)):
            guard let number = Int128(text), number >= schema["minimum"]?.integer ?? .min,
                number <= schema["maximum"]?.integer ?? .max
            else { return refuse(value, schema, path) }
        default: refuse(value, schema, path)
        }
    }

    private mutating func refuse(_ value: JSONTree, _ schema: JSONTree, _ path: String) {
        var wanted = schema["title"]?.word ?? ""
        if wanted.isEmpty {
            wanted =
                switch schema["type"]?.word {
                case "object": "an object"
                case "array": "a list"
                case "boolean": "true or false"
                case "string": "a text"
                default:
                    "a whole number from \(schema["minimum"]?.word ?? "0") to \(schema["maximum"]?.word ?? "2^63")"
                }
        }
        report(path, "\(value.shown) is not \(wanted)", "write \(wanted)")
    }

    private mutating func check(_ text: String, _ schema: JSONTree, _ path: String) throws {
        if case .array(let values)? = schema["enum"] {
            let known = values.map(\.word)
            guard !known.contains(text) else { return }
            let list = known.filter { !$0.isEmpty }.joined(separator: ", ")
            report(path, "'\(text.printable)' is not one of \(list)", "write one of them")
        }
        guard case .string(let pattern)? = schema["pattern"] else { return }
        if patterns[pattern] == nil {
            patterns[pattern] = try Regex(pattern)
        }
        guard let regex = patterns[pattern], text.utf8.count <= 4096, text.wholeMatch(of: regex) != nil else {
            return refuse(.string(text), schema, path)
        }
    }

    private mutating func check(_ members: [JSONTree.Member], _ schema: JSONTree, _ path: String) throws {
        let prefix = path.isEmpty ? "" : path + "."
        for member in members {
            if let known = schema["properties"]?[member.key] {
                try check(member.value, known, prefix + member.key)
            } else if case .object? = schema["additionalProperties"], let element = schema["additionalProperties"] {
                try check(member.value, element, "\(path)[\"\(member.key.printable)\"]")
            } else {
                reportUnknown(member.key, schema, prefix)
            }
        }
        guard case .array(let required)? = schema["required"] else { return }
        for name in required.map(\.word) where !members.contains(where: { $0.key == name }) {
            report(prefix + name, "is missing", "add it")
        }
    }

    private mutating func reportUnknown(_ key: String, _ schema: JSONTree, _ prefix: String) {
        guard case .object(let known)? = schema["properties"] else { return }
        let plain = { (name: String) in name.lowercased().filter { $0 != "_" && $0 != "-" } }
        let near = known.first { plain($0.key) == plain(key) }?.key
        report(
            prefix + key.printable, "is not a field of a manifest",
            near.map { "the field is called \($0)" } ?? "remove it; known here are "
                + known.map(\.key).joined(separator: ", "))
    }
}

extension JSONTree {
    /// The text of a text or number; empty for others.
    fileprivate var word: String {
        switch self {
        case .string(let text), .number(let text): text
        default: ""
        }
    }

    fileprivate var integer: Int128? { Int128(word) }
}
