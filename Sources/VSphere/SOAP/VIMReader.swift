import Export
import CXML
import MigrationModel

/// Reads one SOAP answer as it arrives. Elements that are wanted one by one are handed out and forgotten, so an answer
/// of any length takes the memory of its largest object.
///
/// Nothing outside the bytes is opened, and a document type declaration, hence any entity but XML's own, ends the
/// reading.
final class VIMReader {
    /// Of one object with everything in it, or of an answer apart from its objects.
    static let textLimit = 64 << 20
    static let nodeLimit = 2_000_000
    static let depthLimit = 64

    private static let isReady: Void = xmlInitParser()

    private let name: String
    private let wanted: String?
    private let take: (VIMNode) throws -> Void
    private var parser: xmlParserCtxtPtr?
    private var stack: [VIMNode] = []
    private var text: [UInt8] = []
    private var nodes = 0
    private var textBytes = 0
    private var root: VIMNode?
    private var failure: (any Error)?
    /// libxml2 keeps each name once, so its address stands for it.
    private var names: [UnsafePointer<xmlChar>: String] = [:]

    /// - Parameters:
    ///   - name: what messages call the server.
    ///   - wanted: name of the elements right inside a result that `take` gets instead of the tree.
    init(name: String, each wanted: String?, _ take: @escaping (VIMNode) throws -> Void) throws {
        self.name = name
        self.wanted = wanted
        self.take = take
        _ = Self.isReady
        var handler = xmlSAXHandler()
        handler.initialized = UInt32(XML_SAX2_MAGIC)
        handler.startElementNs = { context, local, _, _, _, _, count, _, attributes in
            VIMReader.of(context)?.start(local, Int(count), attributes)
        }
        handler.endElementNs = { context, _, _, _ in VIMReader.of(context)?.end() }
        handler.characters = { context, bytes, count in VIMReader.of(context)?.characters(bytes, Int(count)) }
        handler.cdataBlock = { context, bytes, count in VIMReader.of(context)?.characters(bytes, Int(count)) }
        handler.internalSubset = { context, _, _, _ in
            guard let reader = VIMReader.of(context) else { return }
            reader.fail(reader.malformed("it has a document type declaration"))
        }
        parser = xmlCreatePushParserCtxt(&handler, Unmanaged.passUnretained(self).toOpaque(), nil, 0, nil)
        guard let parser else { throw MigrationError(.resourceExhausted, "\(name): no memory for an XML parser") }
        xmlCtxtUseOptions(
            parser,
            Int32(XML_PARSE_NONET.rawValue | XML_PARSE_NOERROR.rawValue | XML_PARSE_NOWARNING.rawValue))
    }

    deinit { xmlFreeParserCtxt(parser) }

    private static func of(_ context: UnsafeMutableRawPointer?) -> VIMReader? {
        context.map { Unmanaged<VIMReader>.fromOpaque($0).takeUnretainedValue() }
    }

    func feed(_ bytes: UnsafeRawBufferPointer) throws {
        let status = xmlParseChunk(
            parser, bytes.baseAddress?.assumingMemoryBound(to: CChar.self), Int32(bytes.count), 0)
        if let failure { throw failure }
        guard status == 0 else { throw malformed(lastError) }
    }

    /// The envelope.
    func finish() throws -> VIMNode {
        let status = xmlParseChunk(parser, nil, 0, 1)
        if let failure { throw failure }
        guard status == 0, let root else { throw malformed(lastError) }
        return root
    }

    private var lastError: String {
        guard let error = xmlCtxtGetLastError(parser), let text = error.pointee.message else { return "not complete" }
        return "line \(error.pointee.line): \(String(cString: text).trimmed.printable)"
    }

    private func malformed(_ why: String) -> MigrationError {
        MigrationError(
            .unavailable, "\(name): its answer is not the XML it should be: \(why)",
            hint: "look whether something between here and the server changes or cuts what it sends")
    }

    private func fail(_ error: any Error) {
        if failure == nil { failure = error }
        xmlStopParser(parser)
    }

    private func string(_ pointer: UnsafePointer<xmlChar>) -> String {
        if let known = names[pointer] { return known }
        let text = String(cString: pointer)
        names[pointer] = text
        return text
    }

    private func start(
        _ local: UnsafePointer<xmlChar>?, _ count: Int, _ attributes: UnsafeMutablePointer<UnsafePointer<xmlChar>?>?
    ) {
        guard failure == nil, let local else { return }
        var (type, reference) = ("", "")
        if let attributes {
            for index in 0..<count {
                // Five pointers each: local name, prefix, namespace, first and end of the value.
                guard let attribute = attributes[5 * index], let first = attributes[5 * index + 3],
                    let end = attributes[5 * index + 4], string(attribute) == "type"
                else { continue }
                let value = String(decoding: UnsafeBufferPointer(start: first, count: end - first), as: UTF8.self)
                if attributes[5 * index + 2] == nil {
                    reference = value
                } else {
                    type = value.lastIndex(of: ":").map { String(value[value.index(after: $0)...]) } ?? value
                }
            }
        }
        nodes += 1
        guard stack.count < Self.depthLimit, nodes <= Self.nodeLimit else {
            return fail(malformed("an object has too many elements or nests too deeply"))
        }
        stack.append(VIMNode(name: string(local), type: type, referenceType: reference))
        text.removeAll(keepingCapacity: true)
    }

    private func characters(_ bytes: UnsafePointer<xmlChar>?, _ count: Int) {
        guard failure == nil, let bytes else { return }
        textBytes += count
        guard textBytes <= Self.textLimit else { return fail(malformed("an object has more than 64 MiB of text")) }
        text.append(contentsOf: UnsafeBufferPointer(start: bytes, count: count))
    }

    private func end() {
        guard failure == nil, var node = stack.popLast() else { return }
        if node.children.isEmpty { node.text = String(decoding: text, as: UTF8.self) }
        text.removeAll(keepingCapacity: true)
        // Envelope, Body, …Response, returnval.
        if stack.count == 4, node.name == wanted {
            (nodes, textBytes) = (0, 0)
            do { try take(node) } catch { fail(error) }
        } else if stack.isEmpty {
            root = node
        } else {
            stack[stack.count - 1].children.append(node)
        }
    }
}
