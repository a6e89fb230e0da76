import MigrationModel

extension String {
    /// Safe to show in a message: control characters and those that turn the text's direction replaced, cut to 200
    /// characters.
    package var printable: String {
        let clean = unicodeScalars.prefix(200).map { scalar in
            scalar.properties.generalCategory == .control || scalar.properties.isBidiControl
                ? "\u{FFFD}" : Character(scalar)
        }
        return String(clean) + (unicodeScalars.dropFirst(200).isEmpty ? "" : "…")
    }

    /// Without leading and trailing white space.
    package var trimmed: String {
        guard let first = firstIndex(where: { !$0.isWhitespace }),
            let last = lastIndex(where: { !$0.isWhitespace })
        else { return "" }
        return String(self[first...last])
    }

    /// VMware's and OVF's booleans: TRUE, true, yes, on and 1; nil for anything else that isn't their opposite.
    package var asFlag: Bool? {
        switch lowercased() {
        case "true", "yes", "on", "1": true
        case "false", "no", "off", "0": false
        default: nil
        }
    }

    /// Digits and `-` of a UUID in its canonical form, from any of "56 4d 6c 0a …-…", with dashes or without; nil
    /// when it does not hold 32 hexadecimal digits.
    package var canonicalUUID: String? {
        let digits = unicodeScalars.filter { $0 != " " && $0 != "-" && $0 != "{" && $0 != "}" }
        guard digits.count == 32, digits.allSatisfy({ $0.properties.isASCIIHexDigit }) else { return nil }
        var text = ""
        for (index, digit) in digits.enumerated() {
            if [8, 12, 16, 20].contains(index) { text.append("-") }
            text.unicodeScalars.append(digit)
        }
        return text.lowercased()
    }
}

/// Product of two sizes, refused by name when it doesn't fit what a file system can address (2^63 - 1).
package func checkedBytes(_ count: UInt64, times unit: UInt64, _ what: @autoclosure () -> String) throws -> UInt64 {
    let (product, overflow) = count.multipliedReportingOverflow(by: unit)
    guard !overflow, product <= UInt64(Int64.max) else {
        throw MigrationError(.invalidArgument, "\(what()): \(count) units of \(unit) bytes exceed 2^63 - 1 bytes")
    }
    return product
}

extension String {
    /// For messages about what may be no URL at all: what stands between a user's colon and the last '@' may be a password.
    package var withoutPassword: String {
        let scheme = firstRange(of: "://")?.upperBound ?? (hasPrefix("vsphere:") ? firstIndex(of: ":") : startIndex)
        let account = self[(scheme ?? startIndex)...].drop { $0 == ":" || $0 == "/" }
        let end = account.lastIndex(of: "@") ?? account.endIndex
        guard let colon = account[..<end].firstIndex(of: ":") else { return self }
        if end == account.endIndex {
            // Without '@' a number is a host's port, and only a server's address may hold a password.
            let after = account[colon...].dropFirst().prefix { $0 != "/" && $0 != "?" }
            guard hasPrefix("vsphere:"), !after.allSatisfy({ $0.isASCII && $0.isNumber }) else { return self }
        }
        return self[..<colon] + ":…" + self[end...]
    }
}
