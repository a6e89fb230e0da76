import CXML
import MigrationModel

/// Reads an XML document with libxml2 into values. Nothing outside the bytes is ever opened: no network, no document
/// type declaration (hence no entities but XML's own five), no XInclude. Any thread.
enum XMLDocument {
    static let sizeLimit = 16 << 20
    static let depthLimit = 64
    /// libxml2 2.9 compares every attribute of an element with every other: unlimited, 16 MiB of them take hours.
    static let attributeLimit = 256

    private static let initialized: Void = xmlInitParser()

    /// - Parameter name: what the messages call the document.
    /// - Throws: `invalidArgument` with line and column of the first mistake.
    static func parse(_ bytes: [UInt8], name: String) throws -> XMLElement {
        guard bytes.count <= sizeLimit else {
            throw MigrationError(.invalidArgument, "\(name): larger than the \(sizeLimit) bytes a descriptor may have")
        }
        guard String(validating: bytes, as: UTF8.self) != nil, !bytes.contains(0) else {
            throw MigrationError(
                .invalidArgument, "\(name): is not UTF-8 text", hint: "convert it to UTF-8 with iconv")
        }
        try checkShape(bytes, name: name)
        _ = initialized
        guard let context = xmlNewParserCtxt() else { preconditionFailure("out of memory") }
        let events = ParserEvents()
        defer {
            if let document = context.pointee.myDoc { xmlFreeDoc(document) }
            context.pointee.myDoc = nil
            xmlFreeParserCtxt(context)
        }
        let document = withExtendedLifetime(events) {
            context.pointee._private = Unmanaged.passUnretained(events).toOpaque()
            context.pointee.sax.pointee.internalSubset = { data, _, _, _ in
                ParserEvents.of(data)?.hasDocumentType = true
                xmlStopParser(data?.assumingMemoryBound(to: xmlParserCtxt.self))
            }
            context.pointee.sax.pointee.serror = { data, error in
                guard let error, error.pointee.level.rawValue >= XML_ERR_ERROR.rawValue else { return }
                ParserEvents.of(data)?.record(error)
            }
            let options =
                XML_PARSE_NONET.rawValue | XML_PARSE_NOERROR.rawValue | XML_PARSE_NOWARNING.rawValue
                | XML_PARSE_NOCDATA.rawValue
            return bytes.withUnsafeBytes {
                xmlCtxtReadMemory(
                    context, $0.baseAddress?.assumingMemoryBound(to: CChar.self), Int32($0.count), nil, "UTF-8",
                    Int32(options))
            }
        }
        defer { if let document { xmlFreeDoc(document) } }
        if events.hasDocumentType || document.map({ $0.pointee.intSubset != nil }) == true {
            throw MigrationError(
                .invalidArgument, "\(name): has a document type declaration, which a descriptor never needs",
                hint: "remove the <!DOCTYPE …> if you trust where the file comes from")
        }
        guard let document, events.first == nil, let root = xmlDocGetRootElement(document) else {
            throw MigrationError(.invalidArgument, "\(name): \(events.first ?? "holds no element")")
        }
        return try element(root, depth: 1, name: name)
    }

    private static func element(_ node: xmlNodePtr, depth: Int, name: String) throws -> XMLElement {
        let line = xmlGetLineNo(node)
        guard depth <= depthLimit else {
            throw MigrationError(
                .invalidArgument, "\(name): line \(line): elements nest deeper than \(depthLimit) levels")
        }
        var attributes: [XMLElement.Attribute] = []
        var property = node.pointee.properties
        while let current = property {
            attributes.append(
                XMLElement.Attribute(
                    name: string(current.pointee.name), namespace: string(current.pointee.ns?.pointee.href),
                    value: content(current.pointee.children)))
            property = current.pointee.next
        }
        var children: [XMLElement] = []
        var child = node.pointee.children
        while let current = child {
            if current.pointee.type == XML_ELEMENT_NODE {
                children.append(try element(current, depth: depth + 1, name: name))
            }
            child = current.pointee.next
        }
        return XMLElement(
            name: string(node.pointee.name), namespace: string(node.pointee.ns?.pointee.href),
            attributes: attributes, text: content(node.pointee.children), children: children, line: Int(line))
    }

    /// The text nodes of a sibling list, concatenated.
    private static func content(_ first: xmlNodePtr?) -> String {
        var text = ""
        var node = first
        while let current = node {
            if current.pointee.type == XML_TEXT_NODE || current.pointee.type == XML_CDATA_SECTION_NODE {
                text += string(current.pointee.content)
            }
            node = current.pointee.next
        }
        return text
    }

    private static func string(_ text: UnsafePointer<xmlChar>?) -> String {
        text.map { String(cString: $0) } ?? ""
    }
}

/// What the callbacks of one parse saw. Used on the parsing thread only.
private final class ParserEvents {
    var hasDocumentType = false
    var first: String?

    /// `data` is the parser context, as libxml2 hands it to SAX callbacks unless told otherwise.
    static func of(_ data: UnsafeMutableRawPointer?) -> ParserEvents? {
        guard let owner = data?.assumingMemoryBound(to: xmlParserCtxt.self).pointee._private else { return nil }
        return Unmanaged<ParserEvents>.fromOpaque(owner).takeUnretainedValue()
    }

    func record(_ error: UnsafeMutablePointer<xmlError>) {
        guard first == nil else { return }
        let message = error.pointee.message.map { String(cString: $0) } ?? "not well-formed"
        // int2 is the column (xmlerror.h).
        first = "line \(error.pointee.line), column \(error.pointee.int2): \(message.trimmed.printable)"
    }
}
