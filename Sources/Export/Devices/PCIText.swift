/// PCI numbers as VMware's configuration files write them. Decoded only when one reading is possible.
package enum PCIText {
    /// `domain:bus:device.function` in hexadecimal, or nil when the text has no reading or more than one.
    ///
    /// ESXi writes every field in decimal at the widths 5:3:2.1 (`00000:026:01.2` is 0000:1a:01.2); people write
    /// lspci's hexadecimal at 4:2:2.1, or leave the domain out.
    package static func address(_ text: String) -> String? {
        let dotted = text.split(separator: ".", omittingEmptySubsequences: false)
        guard dotted.count == 2 else { return nil }
        var fields = dotted[0].split(separator: ":", omittingEmptySubsequences: false)
        guard fields.count == 2 || fields.count == 3 else { return nil }
        let widths = fields.map(\.count)
        if fields.count == 2 { fields.insert("0", at: 0) }
        fields.append(dotted[1])

        let decimal = reading(fields, radix: 10)
        let hexadecimal = reading(fields, radix: 16)
        if dotted[1].count == 1, widths == [5, 3, 2], let decimal { return decimal }
        if dotted[1].count == 1, widths == [4, 2, 2] { return hexadecimal }
        switch (decimal, hexadecimal) {
        case (let one?, let other?): return one == other ? one : nil
        case (let one, let other): return one ?? other
        }
    }

    private static func reading(_ fields: [Substring], radix: Int) -> String? {
        let limits = [0xffff, 0xff, 0x1f, 7]
        var numbers: [Int] = []
        for (field, limit) in zip(fields, limits) {
            guard !field.isEmpty, field.count <= 5, field.allSatisfy({ $0.isASCII && $0.isHexDigit }),
                let number = Int(field, radix: radix), number <= limit
            else { return nil }
            numbers.append(number)
        }
        return "\(hexadecimal(numbers[0], 4)):\(hexadecimal(numbers[1], 2)):\(hexadecimal(numbers[2], 2)).\(numbers[3])"
    }

    /// A 16-bit id: `0x10de`, four digits of which one is a letter, or a negative decimal (the signed 16-bit number of
    /// vSphere's API). Plain digits could be either base: nil.
    package static func identifier(_ text: String) -> UInt32? {
        let text = text.lowercased()
        if text.hasPrefix("0x") {
            let digits = text.dropFirst(2)
            guard !digits.isEmpty, digits.count <= 8, let value = UInt32(digits, radix: 16), value <= 0xffff else {
                return nil
            }
            return value
        }
        if text.hasPrefix("-") { return Int16(text).map { UInt32(UInt16(bitPattern: $0)) } }
        guard text.count == 4, text.contains(where: \.isLetter) else { return nil }
        return UInt32(text, radix: 16)
    }

    /// A class code of 16 bits; one with its programming interface (24 bits) loses that.
    package static func classCode(_ text: String) -> UInt32? {
        let lower = text.lowercased()
        let digits = lower.hasPrefix("0x") ? lower.dropFirst(2) : lower[...]
        guard (3...6).contains(digits.count), let value = UInt32(digits, radix: 16) else { return nil }
        return digits.count > 4 ? value >> 8 : value
    }

    package static func hexadecimal(_ value: some BinaryInteger, _ width: Int) -> String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: max(0, width - digits.count)) + digits
    }
}
