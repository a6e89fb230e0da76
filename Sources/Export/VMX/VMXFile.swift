import MigrationModel

/// The dictionary format of VMX and VMSD files: `key = "value"` lines. Keys are compared without regard to case.
struct VMXFile {
    struct Entry {
        let key: String
        let value: String
        let line: Int
    }

    static let sizeLimit = 4 << 20
    private static let entryLimit = 50_000

    /// In the order of the file.
    private(set) var entries: [Entry] = []
    private var index: [String: Int] = [:]
    let name: String

    init(_ bytes: [UInt8], name: String) throws {
        self.name = name
        let bytes = bytes.starts(with: [0xef, 0xbb, 0xbf]) ? bytes[3...] : bytes[...]
        let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
        let encoding = try Self.encoding(lines, name: name)
        for (offset, line) in lines.enumerated() {
            guard let (key, value) = try Self.pair(line, encoding, name: name, line: offset + 1) else { continue }
            let entry = Entry(key: key, value: value, line: offset + 1)
            if let known = index[key.lowercased()] {
                guard entries[known].value == value else {
                    throw MigrationError(
                        .invalidArgument,
                        "\(name): line \(entry.line): \(key.printable) is already set to another value in line "
                            + "\(entries[known].line)",
                        hint: "remove one of the lines; VMware refuses such a file too")
                }
                continue
            }
            guard entries.count < Self.entryLimit else {
                throw MigrationError(.invalidArgument, "\(name): more than \(Self.entryLimit) lines")
            }
            index[key.lowercased()] = entries.count
            entries.append(entry)
        }
    }

    subscript(key: String) -> String? { index[key.lowercased()].map { entries[$0].value } }

    /// The value, or nil when it is missing or empty.
    func text(_ key: String) -> String? { self[key].flatMap { $0.isEmpty ? nil : $0 } }

    /// - Throws: `invalidArgument` naming the line when the value is neither TRUE nor FALSE.
    func flag(_ key: String) throws -> Bool? {
        guard let text = text(key) else { return nil }
        guard let flag = text.asFlag else { throw invalid(key, "is neither TRUE nor FALSE") }
        return flag
    }

    func number(_ key: String) throws -> UInt64? {
        guard let text = text(key) else { return nil }
        guard let number = UInt64(text.trimmed) else { throw invalid(key, "is not a number") }
        return number
    }

    func invalid(_ key: String, _ why: String) -> MigrationError {
        let line = index[key.lowercased()].map { "line \(entries[$0].line): " } ?? ""
        return MigrationError(
            .invalidArgument, "\(name): \(line)\(key) = '\((self[key] ?? "").printable)' \(why)")
    }

    // MARK: Text

    private enum Encoding { case utf8, windows1252 }

    /// `.encoding` counts for the whole file, wherever it stands; UTF-8 without one.
    private static func encoding(_ lines: [ArraySlice<UInt8>], name: String) throws -> Encoding {
        for line in lines {
            let text = String(decoding: line.prefix(128), as: UTF8.self).trimmed
            guard text.lowercased().hasPrefix(".encoding"), let equals = text.firstIndex(of: "=") else { continue }
            let value = text[text.index(after: equals)...].filter { $0 != "\"" }.description.trimmed
            switch value.lowercased() {
            case "utf-8", "utf8": return .utf8
            case "windows-1252", "cp1252": return .windows1252
            default:
                throw MigrationError(
                    .unimplemented, "\(name): is written in the encoding \(value.printable)",
                    hint: "convert it to UTF-8 with iconv and set .encoding = \"UTF-8\"")
            }
        }
        return .utf8
    }

    /// Nil for an empty line or a comment.
    private static func pair(
        _ line: ArraySlice<UInt8>, _ encoding: Encoding, name: String, line number: Int
    ) throws -> (String, String)? {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(.invalidArgument, "\(name): line \(number): \(why)")
        }
        let space: (UInt8) -> Bool = { $0 == UInt8(ascii: " ") || $0 == UInt8(ascii: "\t") || $0 == UInt8(ascii: "\r") }
        let line = line.drop(while: space)
        guard let first = line.first, first != UInt8(ascii: "#") else { return nil }
        guard let equals = line.firstIndex(of: UInt8(ascii: "=")) else {
            throw refuse("is not of the form key = \"value\"")
        }
        let rawKey = line[..<equals].reversed().drop(while: space).reversed()
        guard let key = String(validating: rawKey, as: UTF8.self), !key.isEmpty, !key.contains("\"") else {
            throw refuse("has no usable key")
        }
        var raw = line[(equals + 1)...].drop(while: space)
        if raw.first == UInt8(ascii: "\"") {
            raw = raw.dropFirst()
            guard let end = raw.firstIndex(of: UInt8(ascii: "\"")) else {
                throw refuse("its value has no closing quote")
            }
            let rest = raw[(end + 1)...].drop(while: space)
            guard rest.isEmpty || rest.first == UInt8(ascii: "#") else { throw refuse("has text after its value") }
            raw = raw[..<end]
        } else {
            while let last = raw.last, space(last) { raw = raw.dropLast() }
        }
        let bytes = try unescaped(raw, refuse)
        switch encoding {
        case .windows1252: return (key, windows1252(bytes))
        case .utf8:
            guard let value = String(validating: bytes, as: UTF8.self) else {
                throw refuse("is not UTF-8, as the file says or implies")
            }
            return (key, value)
        }
    }

    /// `|22` is the byte 0x22. A NUL would cut the value for whoever reads it next.
    private static func unescaped(
        _ raw: ArraySlice<UInt8>, _ refuse: (String) -> MigrationError
    ) throws -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(raw.count)
        var rest = raw
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "|") else {
                if byte == 0 { throw refuse("contains a NUL byte") }
                bytes.append(byte)
                continue
            }
            let digits = String(decoding: rest.prefix(2), as: UTF8.self)
            guard digits.utf8.count == 2, digits.allSatisfy(\.isHexDigit), let value = UInt8(digits, radix: 16),
                value != 0
            else { throw refuse("has an escape '|\(digits.printable)' that is no byte") }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return bytes
    }

    /// 0x80 to 0x9f differ from Latin-1; the five unused codes become U+FFFD.
    private static func windows1252(_ bytes: [UInt8]) -> String {
        let high: [UInt32] = [
            0x20ac, 0xfffd, 0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021, 0x02c6, 0x2030, 0x0160, 0x2039, 0x0152,
            0xfffd, 0x017d, 0xfffd, 0xfffd, 0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014, 0x02dc, 0x2122,
            0x0161, 0x203a, 0x0153, 0xfffd, 0x017e, 0x0178,
        ]
        var scalars = String.UnicodeScalarView()
        for byte in bytes {
            let code = (0x80..<0xa0).contains(byte) ? high[Int(byte) - 0x80] : UInt32(byte)
            scalars.append(Unicode.Scalar(code) ?? "\u{FFFD}")
        }
        return String(scalars)
    }
}
