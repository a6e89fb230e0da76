import MigrationModel

/// A JSON value as it was written: numbers keep their text, objects their order. Hostile input costs no more than a
/// small multiple of its length.
package indirect enum JSONTree: Sendable, Equatable {
    case null
    case bool(Bool)
    /// Its text, a number by JSON's grammar.
    case number(String)
    case string(String)
    case array([JSONTree])
    case object([Member])

    package struct Member: Sendable, Equatable {
        package var key: String
        package var value: JSONTree

        package init(_ key: String, _ value: JSONTree) {
            self.key = key
            self.value = value
        }
    }

    static let depthLimit = 64
    static let sizeLimit = 16 << 20

    /// The member of an object; nil for other values.
    package subscript(key: String) -> JSONTree? {
        guard case .object(let members) = self else { return nil }
        return members.first { $0.key == key }?.value
    }

    var kind: String {
        switch self {
        case .null: "null"
        case .bool: "true or false"
        case .number: "a number"
        case .string: "a text"
        case .array: "a list"
        case .object: "an object"
        }
    }

    /// The value for a message.
    var shown: String {
        switch self {
        case .string(let text): "'\(text.printable)'"
        case .number(let text): text.printable
        case .bool(let flag): "\(flag)"
        default: kind
        }
    }

    /// - Throws: `invalidArgument` naming the line, for text that is no JSON or repeats a key (RFC 8259 leaves open
    ///   which one counts).
    package init(parsing bytes: [UInt8], name: String) throws {
        guard bytes.count <= Self.sizeLimit else {
            throw MigrationError(.invalidArgument, "\(name): larger than the \(Self.sizeLimit) bytes it may have")
        }
        var parser = Parser(bytes: bytes, name: name)
        self = try parser.document()
    }

    private struct Parser {
        let bytes: [UInt8]
        let name: String
        var at = 0

        func fail(_ why: String) -> MigrationError {
            let line = bytes[..<min(at, bytes.count)].count { $0 == UInt8(ascii: "\n") } + 1
            return MigrationError(.invalidArgument, "\(name): line \(line): \(why)", hint: "it has to be valid JSON")
        }

        mutating func document() throws -> JSONTree {
            if bytes.starts(with: [0xEF, 0xBB, 0xBF]) { at = 3 }
            let value = try value(depth: 0)
            skipSpace()
            guard at == bytes.count else { throw fail("there is text after the end of the document") }
            return value
        }

        private mutating func skipSpace() {
            while at < bytes.count, [0x20, 0x09, 0x0A, 0x0D].contains(bytes[at]) { at += 1 }
        }

        private mutating func take(_ character: Character) -> Bool {
            skipSpace()
            guard at < bytes.count, bytes[at] == character.asciiValue else { return false }
            at += 1
            return true
        }

        private mutating func value(depth: Int) throws -> JSONTree {
            guard depth < JSONTree.depthLimit else { throw fail("nested deeper than \(JSONTree.depthLimit) levels") }
            skipSpace()
            guard at < bytes.count else { throw fail("the document ends too early") }
            switch bytes[at] {
            case UInt8(ascii: "{"): return try object(depth)
            case UInt8(ascii: "["):
                at += 1
                var items: [JSONTree] = []
                if take("]") { return .array([]) }
                repeat { items.append(try value(depth: depth + 1)) } while take(",")
                guard take("]") else { throw fail("a list lacks its ',' or ']'") }
                return .array(items)
            case UInt8(ascii: "\""): return .string(try text())
            default: return try word()
            }
        }

        private mutating func object(_ depth: Int) throws -> JSONTree {
            at += 1
            var members: [Member] = []
            var keys: Set<String> = []
            if take("}") { return .object([]) }
            repeat {
                skipSpace()
                guard at < bytes.count, bytes[at] == UInt8(ascii: "\"") else { throw fail("an object lacks a key") }
                let key = try text()
                guard keys.insert(key).inserted else { throw fail("the key '\(key.printable)' is there twice") }
                guard take(":") else { throw fail("the key '\(key.printable)' lacks its ':'") }
                members.append(Member(key, try value(depth: depth + 1)))
            } while take(",")
            guard take("}") else { throw fail("an object lacks its ',' or '}'") }
            return .object(members)
        }

        private mutating func word() throws -> JSONTree {
            let start = at
            while at < bytes.count, Character(Unicode.Scalar(bytes[at])).isWordPart { at += 1 }
            let word = String(decoding: bytes[start..<at], as: UTF8.self)
            switch word {
            case "true": return .bool(true)
            case "false": return .bool(false)
            case "null": return .null
            default:
                guard JSONTree.isNumber(word) else {
                    at = start
                    throw fail("'\(word.printable)' is no value of JSON")
                }
                return .number(word)
            }
        }

        private mutating func text() throws -> String {
            at += 1
            var result: [UInt8] = []
            while true {
                guard at < bytes.count else { throw fail("a text lacks its closing quote") }
                let byte = bytes[at]
                at += 1
                switch byte {
                case UInt8(ascii: "\""):
                    guard let text = String(validating: result, as: UTF8.self) else {
                        throw fail("a text is not UTF-8")
                    }
                    return text
                case UInt8(ascii: "\\"): result += Array(String(try escape()).utf8)
                case ..<0x20: throw fail("a text holds a control character")
                default: result.append(byte)
                }
            }
        }

        private mutating func escape() throws -> Character {
            guard at < bytes.count else { throw fail("a text lacks its closing quote") }
            let byte = bytes[at]
            at += 1
            switch byte {
            case UInt8(ascii: "n"): return "\n"
            case UInt8(ascii: "t"): return "\t"
            case UInt8(ascii: "r"): return "\r"
            case UInt8(ascii: "b"): return "\u{8}"
            case UInt8(ascii: "f"): return "\u{C}"
            case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return Character(Unicode.Scalar(byte))
            case UInt8(ascii: "u"):
                var code = try unit()
                if (0xD800..<0xDC00).contains(code), bytes[at...].starts(with: Array("\\u".utf8)) {
                    at += 2
                    let low = try unit()
                    guard (0xDC00..<0xE000).contains(low) else { throw fail("half of a surrogate pair") }
                    code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
                }
                guard code != 0, let scalar = Unicode.Scalar(code) else { throw fail("an escape is no character") }
                return Character(scalar)
            default: throw fail("an unknown escape")
            }
        }

        private mutating func unit() throws -> UInt32 {
            let digits = String(decoding: bytes[at...].prefix(4), as: UTF8.self)
            guard digits.utf8.count == 4, digits.allSatisfy(\.isHexDigit), let code = UInt32(digits, radix: 16) else {
                throw fail("\\u needs four hexadecimal digits")
            }
            at += 4
            return code
        }
    }

    /// JSON's grammar of numbers: no leading zeros, no plus, no bare dot.
    static func isNumber(_ text: String) -> Bool {
        var rest = Array(text.utf8)[...]
        func digits() -> Int {
            let count = rest.prefix { (0x30...0x39).contains($0) }.count
            rest = rest.dropFirst(count)
            return count
        }
        if rest.first == UInt8(ascii: "-") { rest = rest.dropFirst() }
        let zero = rest.first == UInt8(ascii: "0")
        let whole = digits()
        guard whole > 0, !zero || whole == 1 else { return false }
        if rest.first == UInt8(ascii: ".") {
            rest = rest.dropFirst()
            guard digits() > 0 else { return false }
        }
        if rest.first == UInt8(ascii: "e") || rest.first == UInt8(ascii: "E") {
            rest = rest.dropFirst()
            if rest.first == UInt8(ascii: "+") || rest.first == UInt8(ascii: "-") { rest = rest.dropFirst() }
            guard digits() > 0 else { return false }
        }
        return rest.isEmpty && text.utf8.count <= 64
    }
}

extension Character {
    fileprivate var isWordPart: Bool { isASCII && (isLetter || isNumber || self == "-" || self == "+" || self == ".") }
}
