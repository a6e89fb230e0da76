import CXML
import MigrationModel

/// An element of a parsed document, copied out of libxml2. For documents that libvirt wrote: small and trusted, but
/// parsed without network, entities or documents above libxml2's limits all the same.
struct XMLTree: Sendable {
    var name: String
    var attributes: [String: String] = [:]
    /// The element's own text, without that of its children.
    var text = ""
    var children: [XMLTree] = []

    static func parse(_ document: String, of object: String) throws -> XMLTree {
        let options = Int32(
            XML_PARSE_NONET.rawValue | XML_PARSE_NOERROR.rawValue | XML_PARSE_NOWARNING.rawValue
                | XML_PARSE_NOCDATA.rawValue)
        let bytes = Array(document.utf8)
        let parsed = bytes.withUnsafeBytes { buffer in
            xmlReadMemory(
                buffer.baseAddress?.assumingMemoryBound(to: CChar.self), Int32(clamping: buffer.count), nil, "UTF-8",
                options)
        }
        guard let parsed else { throw MigrationError(.internal, "\(object) is not well-formed XML") }
        defer { xmlFreeDoc(parsed) }
        guard let root = xmlDocGetRootElement(parsed) else { throw MigrationError(.internal, "\(object) is empty") }
        return XMLTree(root)
    }

    /// libxml2 refuses documents nested deeper than 256 elements, so this recursion is bounded.
    private init(_ node: xmlNodePtr) {
        name = String(cString: node.pointee.name)
        var attribute = node.pointee.properties
        while let current = attribute {
            var value = ""
            var part = current.pointee.children
            while let text = part {
                if let content = text.pointee.content { value += String(cString: content) }
                part = text.pointee.next
            }
            attributes[String(cString: current.pointee.name)] = value
            attribute = current.pointee.next
        }
        var child = node.pointee.children
        while let current = child {
            switch current.pointee.type {
            case XML_ELEMENT_NODE: children.append(XMLTree(current))
            case XML_TEXT_NODE, XML_CDATA_SECTION_NODE:
                if let content = current.pointee.content { text += String(cString: content) }
            default: break
            }
            child = current.pointee.next
        }
    }

    /// Every element below this one.
    var descendants: [XMLTree] { children.flatMap { [$0] + $0.descendants } }

    /// Elements at a path of names below this one.
    func all(_ path: String...) -> [XMLTree] {
        path.reduce([self]) { level, name in level.flatMap { $0.children.filter { $0.name == name } } }
    }
}
