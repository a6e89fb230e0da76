import MigrationModel
import Yams

extension JSONTree {
    /// A YAML document's only tree, with plain scalars as YAML 1.1 reads them. Aliases are refused: a few lines of them
    /// make millions of nodes.
    init(parsingYAML bytes: [UInt8], name: String) throws {
        guard bytes.count <= 4 << 20, let text = String(validating: bytes, as: UTF8.self) else {
            throw MigrationError(.invalidArgument, "\(name): is not UTF-8 text of at most 4 MiB")
        }
        let node: Node?
        do { node = try Yams.compose(yaml: text) } catch {
            var why = "\(error)"
            // Its own text repeats the line, whatever that holds.
            switch error as? YamlError {
            case .scanner(_, let problem, let mark, _), .parser(_, let problem, let mark, _),
                .composer(_, let problem, let mark, _):
                why = "line \(mark.line): \(problem)"
            default: break
            }
            throw MigrationError(
                .invalidArgument, "\(name): is neither JSON nor YAML: \(why.printable)",
                hint: "correct that line, or give a manifest that a program wrote")
        }
        var left = bytes.count + 16
        self = try node.map { try Self.tree($0, name, depth: 0, &left) } ?? .null
    }

    private static func tree(_ node: Node, _ name: String, depth: Int, _ left: inout Int) throws -> JSONTree {
        // A document without aliases has fewer nodes than bytes.
        left -= 1
        guard left > 0, depth < depthLimit else {
            throw MigrationError(
                .invalidArgument, "\(name): line \(node.mark?.line ?? 0): is nested too deeply or repeats itself",
                hint: "write it without anchors and aliases")
        }
        switch node {
        case .mapping(let mapping):
            var members: [Member] = []
            for (key, value) in mapping {
                guard case .scalar(let scalar) = key else {
                    throw MigrationError(
                        .invalidArgument, "\(name): line \(key.mark?.line ?? 0): a key that is no plain text")
                }
                members.append(Member(scalar.string, try tree(value, name, depth: depth + 1, &left)))
            }
            return .object(members)
        case .sequence(let items): return .array(try items.map { try tree($0, name, depth: depth + 1, &left) })
        case .scalar(let scalar):
            guard scalar.style == .plain else { return .string(scalar.string) }
            if node.null != nil { return .null }
            if let flag = node.bool { return .bool(flag) }
            return isNumber(scalar.string) ? .number(scalar.string) : .string(scalar.string)
        default:
            throw MigrationError(
                .invalidArgument, "\(name): line \(node.mark?.line ?? 0): has an alias",
                hint: "write it without anchors and aliases")
        }
    }
}
