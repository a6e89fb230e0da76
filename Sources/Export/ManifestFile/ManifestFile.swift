package import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf

/// A manifest in a file: this program's own in JSON, or HyperSDK's Artifact Manifest 1.0 in JSON or YAML. Read
/// strictly: what isn't understood is a problem, not left out.
package struct ManifestFile: Sendable {
    package enum Form: String, Sendable {
        case flotilla
        case hyperSDK = "hypersdk"
    }

    package let form: Form
    /// As the file says it, paths of disks included. Nil when problems leave nothing to be made of it.
    package let manifest: Manifest?
    package let problems: [ManifestProblem]

    /// The schema's version that this program writes and reads.
    static let schemaVersion: UInt32 = 1

    /// - Throws: `invalidArgument` for a file that is neither JSON nor YAML, `notFound` when it isn't there.
    package init(path: String) throws {
        try self.init(try Self.read(path), name: path)
    }

    static func read(_ path: String) throws -> [UInt8] {
        try Region.whole(path).read(limit: JSONTree.sizeLimit, name: path)
    }

    package init(_ bytes: [UInt8], name: String) throws {
        let isJSON = bytes.first { ![0x20, 0x09, 0x0A, 0x0D, 0xEF, 0xBB, 0xBF].contains($0) } == UInt8(ascii: "{")
        let tree = isJSON ? try JSONTree(parsing: bytes, name: name) : try JSONTree(parsingYAML: bytes, name: name)
        guard case .object = tree else {
            throw MigrationError(
                .invalidArgument, "\(name): is not a manifest: \(tree.kind) where an object belongs",
                hint: "give a manifest of this program, or an Artifact Manifest 1.0 of HyperSDK")
        }
        if tree["manifest_version"] != nil {
            form = .hyperSDK
            var reader = HyperSDKReader()
            let manifest = reader.read(tree)
            problems = reader.problems
            self.manifest = problems.isEmpty ? manifest : nil
            return
        }
        form = .flotilla
        (manifest, problems) = try Self.flotilla(tree, isJSON ? bytes : Array(tree.text.utf8))
    }

    private static func flotilla(_ tree: JSONTree, _ json: [UInt8]) throws -> (Manifest?, [ManifestProblem]) {
        if case .number(let text)? = tree["schemaVersion"], let version = UInt64(text), version > schemaVersion {
            // Everything else would be judged by the wrong rules.
            return (
                nil,
                [
                    ManifestProblem(
                        "schemaVersion", "\(version) is newer than \(schemaVersion), which this program knows",
                        "read it with the program that wrote it, or a newer one")
                ]
            )
        }
        var check = try SchemaCheck(definitions: ManifestSchema.definitions)
        try check.check(tree, as: "Manifest")
        guard check.problems.isEmpty else { return (nil, check.problems) }
        do {
            let manifest = try Manifest(jsonUTF8Bytes: json)
            let problems = manifest.inconsistencies()
            return (problems.isEmpty ? manifest : nil, problems)
        } catch {
            return (nil, [ManifestProblem("", "\(error)", "write it as protobuf's JSON mapping wants it")])
        }
    }

    /// The manifest, or the first problems as one error.
    package func valid(name: String) throws -> Manifest {
        if let manifest { return manifest }
        let told = problems.prefix(3).map(\.description).joined(separator: "; ")
        let more = problems.count > 3 ? "; and \(problems.count - 3) more" : ""
        throw MigrationError(
            .invalidArgument, "\(name): \(told)\(more)",
            hint: problems.count == 1 ? problems.first?.remedy : "flotilla manifest validate shows all, with remedies")
    }
}

extension JSONTree {
    /// Compact JSON.
    var text: String {
        var out = ""
        write(to: &out, indent: nil, level: 0)
        return out
    }

    /// JSON, two spaces a level.
    package var indented: String {
        var out = ""
        write(to: &out, indent: 2, level: 0)
        return out + "\n"
    }

    private func write(to out: inout String, indent: Int?, level: Int) {
        func line(_ level: Int) { if let indent { out += "\n" + String(repeating: " ", count: indent * level) } }
        switch self {
        case .null: out += "null"
        case .bool(let flag): out += flag ? "true" : "false"
        case .number(let text): out += text
        case .string(let text): Self.quote(text, to: &out)
        case .array(let items):
            out += "["
            for (index, item) in items.enumerated() {
                if index > 0 { out += "," }
                line(level + 1)
                item.write(to: &out, indent: indent, level: level + 1)
            }
            if !items.isEmpty { line(level) }
            out += "]"
        case .object(let members):
            out += "{"
            for (index, member) in members.enumerated() {
                if index > 0 { out += "," }
                line(level + 1)
                Self.quote(member.key, to: &out)
                out += indent == nil ? ":" : ": "
                member.value.write(to: &out, indent: indent, level: level + 1)
            }
            if !members.isEmpty { line(level) }
            out += "}"
        }
    }

    private static func quote(_ text: String, to out: inout String) {
        out += "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": out += "\\\""
            case "\\": out += "\\\\"
            case "\n": out += "\\n"
            case "\t": out += "\\t"
            case "\r": out += "\\r"
            case _ where scalar.value < 0x20: out += "\\u00" + PCIText.hexadecimal(scalar.value, 2)
            default: out.unicodeScalars.append(scalar)
            }
        }
        out += "\""
    }
}
