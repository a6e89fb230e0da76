/// One element of a parsed document. Names are compared by namespace URI and local name, never by prefix.
struct XMLElement: Sendable {
    struct Attribute: Sendable {
        let name: String
        /// Empty for an attribute without prefix, which belongs to no namespace.
        let namespace: String
        let value: String
    }

    let name: String
    let namespace: String
    let attributes: [Attribute]
    /// Text directly inside, CDATA included, without that of child elements.
    let text: String
    let children: [XMLElement]
    /// Line of the start tag, from 1.
    let line: Int

    /// Children of this name in any of the namespaces.
    func children(_ name: String, _ namespaces: Set<String>) -> [XMLElement] {
        children.filter { $0.name == name && namespaces.contains($0.namespace) }
    }

    func child(_ name: String, _ namespaces: Set<String>) -> XMLElement? {
        children.first { $0.name == name && namespaces.contains($0.namespace) }
    }

    /// The attribute in one of the namespaces, or written without prefix, as some writers do.
    func attribute(_ name: String, _ namespaces: Set<String>) -> String? {
        attributes.first { $0.name == name && namespaces.contains($0.namespace) }?.value
            ?? attributes.first { $0.name == name && $0.namespace.isEmpty }?.value
    }
}
