import MigrationModel

extension XMLDocument {
    /// Counts attributes per element before libxml2 sees them. Knows just enough of XML for that: quotes inside tags,
    /// comments, CDATA sections and processing instructions. What it misreads libxml2 refuses as not well-formed.
    static func checkShape(_ bytes: [UInt8], name: String) throws {
        var index = 0
        var line = 1
        func starts(_ text: StaticString) -> Bool {
            text.withUTF8Buffer { text in
                index + text.count <= bytes.count && bytes[index..<(index + text.count)].elementsEqual(text)
            }
        }
        func skip(past end: StaticString) {
            while index < bytes.count, !starts(end) { advance() }
            index = min(index + end.utf8CodeUnitCount, bytes.count)
        }
        func advance() {
            if bytes[index] == UInt8(ascii: "\n") { line += 1 }
            index += 1
        }
        while index < bytes.count {
            guard bytes[index] == UInt8(ascii: "<") else {
                advance()
                continue
            }
            if starts("<!--") {
                index += 4
                skip(past: "-->")
            } else if starts("<![CDATA[") {
                skip(past: "]]>")
            } else if starts("<?") {
                skip(past: "?>")
            } else {
                var attributes = 0
                var quote: UInt8?
                while index < bytes.count, quote != nil || bytes[index] != UInt8(ascii: ">") {
                    let byte = bytes[index]
                    if let open = quote {
                        if byte == open { quote = nil }
                    } else if byte == UInt8(ascii: "\"") || byte == UInt8(ascii: "'") {
                        quote = byte
                        attributes += 1
                    }
                    advance()
                }
                guard attributes <= attributeLimit else {
                    throw MigrationError(
                        .invalidArgument,
                        "\(name): line \(line): an element has more than \(attributeLimit) attributes")
                }
            }
        }
    }
}
