import MigrationModel

/// A managed object reference: "VirtualMachine", "vm-42".
package struct ObjectReference: Sendable, Hashable, CustomStringConvertible {
    package let type: String
    package let value: String

    package init(_ type: String, _ value: String) {
        self.type = type
        self.value = value
    }

    package var description: String { "\(type) \(value)" }
}

/// One element of an answer. The API's XML has text in leaves only and never repeats an attribute's name.
package struct VIMNode: Sendable {
    package let name: String
    /// `xsi:type` without its prefix: which subclass of the declared type this is.
    package let type: String
    /// The `type` of a managed object reference.
    let referenceType: String
    package internal(set) var text = ""
    package internal(set) var children: [VIMNode] = []

    init(name: String, type: String = "", referenceType: String = "") {
        self.name = name
        self.type = type
        self.referenceType = referenceType
    }

    package subscript(_ name: String) -> VIMNode? { children.first { $0.name == name } }

    package func all(_ name: String) -> [VIMNode] { children.filter { $0.name == name } }

    /// The text of a child; nil where it isn't there or is empty.
    package func text(_ name: String) -> String? {
        guard let text = self[name]?.text, !text.isEmpty else { return nil }
        return text
    }

    package func flag(_ name: String) -> Bool? { text(name).flatMap(VIMNode.flag) }

    package func number(_ name: String) -> Int64? { text(name).flatMap { Int64($0) } }

    package var flag: Bool? { VIMNode.flag(text) }

    package var reference: ObjectReference? {
        text.isEmpty || referenceType.isEmpty ? nil : ObjectReference(referenceType, text)
    }

    package func reference(_ name: String) -> ObjectReference? { self[name]?.reference }

    /// The items of an `ArrayOf…`.
    package var items: [VIMNode] { children }

    private static func flag(_ text: String) -> Bool? {
        switch text {
        case "true", "1": true
        case "false", "0": false
        default: nil
        }
    }
}

/// The properties that were read of one managed object.
package struct ObjectContent: Sendable {
    package let object: ObjectReference
    private var values: [String: VIMNode] = [:]
    /// Properties that the account may not see. An old server has not all, which counts for nothing.
    package private(set) var hidden: [String] = []

    init?(_ node: VIMNode) {
        guard let object = node.reference("obj") else { return nil }
        self.object = object
        for child in node.children {
            switch child.name {
            case "propSet":
                if let name = child.text("name"), let value = child["val"] { values[name] = value }
            case "missingSet":
                guard child["fault"]?["fault"]?.type == "NoPermission", let path = child.text("path") else { break }
                hidden.append(path)
            default: break
            }
        }
    }

    package subscript(_ path: String) -> VIMNode? { values[path] }
    package func text(_ path: String) -> String? { values[path].flatMap { $0.text.isEmpty ? nil : $0.text } }
    package func flag(_ path: String) -> Bool? { values[path]?.flag }
    package func number(_ path: String) -> Int64? { text(path).flatMap { Int64($0) } }
    package func reference(_ path: String) -> ObjectReference? { values[path]?.reference }
    package func items(_ path: String) -> [VIMNode] { values[path]?.children ?? [] }
}
