import MigrationModel

/// The text part of a VMDK: `key=value` lines and extent lines.
struct VMDKDescriptor {
    private var values: [String: String] = [:]
    private(set) var extents: [VMDKSummary.Extent] = []

    static let extentLimit = 4096

    static func isDescriptor(_ bytes: [UInt8]) -> Bool {
        bytes.prefix(2048).split(separator: UInt8(ascii: "\n")).contains { line in
            let text = String(decoding: line, as: UTF8.self)
            return text.hasPrefix("# Disk DescriptorFile") || text.hasPrefix("createType")
        }
    }

    /// Keys without regard to case, which writers disagree on (`CID`, `parentCID`, `thinProvisioned`).
    subscript(key: String) -> String? { values[key.lowercased()] }

    /// `bytes` may end in NULs, as embedded descriptors do.
    init(_ bytes: [UInt8], owner: String) throws {
        let lines = bytes.prefix { $0 != 0 }.split { $0 == UInt8(ascii: "\n") || $0 == UInt8(ascii: "\r") }
        for line in lines {
            // File names may be in the writer's code page: kept readable, a wrong one is then not found by name.
            let text = String(decoding: line, as: UTF8.self).trimmed
            if text.isEmpty || text.hasPrefix("#") { continue }
            let word = text.prefix { !$0.isWhitespace }
            if ["RW", "RDONLY", "NOACCESS"].contains(word) {
                guard extents.count < Self.extentLimit else {
                    throw MigrationError(.invalidArgument, "\(owner): more than \(Self.extentLimit) extents")
                }
                extents.append(try Self.extent(text, owner: owner))
            } else if let equals = text.firstIndex(of: "=") {
                let value = String(text[text.index(after: equals)...]).trimmed
                values[String(text[..<equals]).trimmed.lowercased()] = Self.unquoted(value)
            }
        }
    }

    /// `RW 4192256 SPARSE "test-s001.vmdk" 0`
    private static func extent(_ line: String, owner: String) throws -> VMDKSummary.Extent {
        let words = line.split(maxSplits: 3) { $0.isWhitespace }
        guard words.count >= 3, let sectors = UInt64(words[1]) else {
            throw MigrationError(.invalidArgument, "\(owner): malformed extent line '\(line.printable)'")
        }
        let kind = String(words[2]).uppercased()
        var file = ""
        if words.count == 4 {
            let quoted = words[3]
            guard quoted.hasPrefix("\""), let end = quoted.dropFirst().firstIndex(of: "\"") else {
                throw MigrationError(.invalidArgument, "\(owner): malformed extent line '\(line.printable)'")
            }
            file = String(quoted[quoted.index(after: quoted.startIndex)..<end])
        }
        guard kind == "ZERO" || !file.isEmpty else {
            throw MigrationError(.invalidArgument, "\(owner): extent line '\(line.printable)' names no file")
        }
        return VMDKSummary.Extent(sectors: sectors, kind: kind, file: file)
    }

    private static func unquoted(_ value: String) -> String {
        value.count >= 2 && value.hasPrefix("\"") && value.hasSuffix("\"")
            ? String(value.dropFirst().dropLast()) : value
    }
}
