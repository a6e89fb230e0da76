/// Builds an indented XML document. Everything passed in is escaped, and characters that XML 1.0 can't hold
/// (section 2.2: most control characters) are left out, so any text gives a well-formed document.
struct XMLWriter {
    private(set) var text = ""
    private var depth = 0

    mutating func element(_ name: String, _ attributes: KeyValuePairs<String, String> = [:]) {
        open(name, attributes, end: "/>\n")
    }

    mutating func element(_ name: String, _ attributes: KeyValuePairs<String, String> = [:], text content: String) {
        open(name, attributes, end: ">")
        text += "\(Self.escape(content, attribute: false))</\(name)>\n"
    }

    mutating func element(
        _ name: String, _ attributes: KeyValuePairs<String, String> = [:], _ content: (inout XMLWriter) throws -> Void
    ) rethrows {
        open(name, attributes, end: ">\n")
        depth += 1
        try content(&self)
        depth -= 1
        text += "\(indent)</\(name)>\n"
    }

    private var indent: String { String(repeating: "  ", count: depth) }

    private mutating func open(_ name: String, _ attributes: KeyValuePairs<String, String>, end: String) {
        text += "\(indent)<\(name)"
        for (key, value) in attributes { text += " \(key)=\"\(Self.escape(value, attribute: true))\"" }
        text += end
    }

    static func escape(_ content: String, attribute: Bool) -> String {
        var result = ""
        for scalar in content.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "\"" where attribute: result += "&quot;"
            // A parser turns a bare carriage return into a newline, and an attribute's white space into blanks.
            case "\r": result += "&#13;"
            case "\n" where attribute: result += "&#10;"
            case "\t" where attribute: result += "&#9;"
            case "\n", "\t": result.unicodeScalars.append(scalar)
            case "\u{0}"..."\u{1F}", "\u{7F}"..."\u{9F}", "\u{FFFE}", "\u{FFFF}": continue
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }
}
