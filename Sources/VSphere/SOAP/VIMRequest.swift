/// A method call on a managed object, as XML.
struct VIMRequest {
    let method: String
    private let target: ObjectReference
    private let arguments: String
    /// Whether sending it twice does what sending it once does.
    let isRepeatable: Bool

    /// - Parameter arguments: encoded, in the order of the API's definition.
    init(_ method: String, on target: ObjectReference, _ arguments: [String] = [], isRepeatable: Bool = true) {
        self.method = method
        self.target = target
        self.arguments = arguments.joined()
        self.isRepeatable = isRepeatable
    }

    var bytes: [UInt8] {
        let text = """
            <?xml version="1.0" encoding="UTF-8"?>
            <soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" \
            xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:xsd="http://www.w3.org/2001/XMLSchema">\
            <soapenv:Body><\(method) xmlns="urn:vim25">\(XML.reference("_this", target))\(arguments)</\(method)>\
            </soapenv:Body></soapenv:Envelope>
            """
        return Array(text.utf8)
    }
}

/// Elements of a request. Everything that isn't ours is escaped.
enum XML {
    static func text(_ name: String, _ value: String) -> String { "<\(name)>\(escaped(value))</\(name)>" }
    static func flag(_ name: String, _ value: Bool) -> String { "<\(name)>\(value)</\(name)>" }
    static func number(_ name: String, _ value: Int) -> String { "<\(name)>\(value)</\(name)>" }

    static func reference(_ name: String, _ object: ObjectReference) -> String {
        "<\(name) type=\"\(escaped(object.type))\">\(escaped(object.value))</\(name)>"
    }

    /// - Parameter type: `xsi:type`, where the declared type has subclasses.
    static func element(_ name: String, type: String? = nil, _ content: [String]) -> String {
        "<\(name)\(type.map { " xsi:type=\"\($0)\"" } ?? "")>\(content.joined())</\(name)>"
    }

    /// Characters that XML 1.0 can't hold become U+FFFD.
    static func escaped(_ value: String) -> String {
        var result = ""
        for scalar in value.unicodeScalars {
            switch scalar {
            case "&": result += "&amp;"
            case "<": result += "&lt;"
            case ">": result += "&gt;"
            case "\"": result += "&quot;"
            case "'": result += "&apos;"
            case "\t", "\n": result.unicodeScalars.append(scalar)
            case "\r": result += "&#13;"
            case "\0"..."\u{1F}", "\u{FFFE}", "\u{FFFF}": result += "\u{FFFD}"
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result
    }
}
