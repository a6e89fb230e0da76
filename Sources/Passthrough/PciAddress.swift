/// domain:bus:slot.function, written "0000:3b:00.0". Domains wider than 16 bits exist (Intel VMD).
package struct PciAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
    package var domain: UInt32
    package var bus: UInt8
    package var slot: UInt8
    package var function: UInt8

    /// Nil unless `text` is the kernel's own notation, all fields hexadecimal.
    package init?(_ text: String) {
        guard text.utf8.allSatisfy({ UInt8(ascii: "0")...UInt8(ascii: ":") ~= $0 || 0x61...0x66 ~= $0 || $0 == 0x2e })
        else { return nil }
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard parts.count == 3 else { return nil }
        let last = parts[2].split(separator: ".", omittingEmptySubsequences: false)
        guard last.count == 2, (4...8).contains(parts[0].count), parts[1].count == 2, last[0].count == 2,
            last[1].count == 1,
            let domain = UInt32(parts[0], radix: 16), let bus = UInt8(parts[1], radix: 16),
            let slot = UInt8(last[0], radix: 16), let function = UInt8(last[1], radix: 16),
            slot < 32, function < 8
        else { return nil }
        self.domain = domain
        self.bus = bus
        self.slot = slot
        self.function = function
    }

    /// "0000:3b:00", what the functions of one device have in common.
    package var slotName: String { String(description.dropLast(2)) }

    package var description: String {
        "\(padded(domain, 4)):\(padded(bus, 2)):\(padded(slot, 2)).\(function)"
    }

    package static func < (a: Self, b: Self) -> Bool {
        (a.domain, a.bus, a.slot, a.function) < (b.domain, b.bus, b.slot, b.function)
    }
}

/// Lower-case hexadecimal with at least `width` digits.
package func padded(_ number: some BinaryInteger, _ width: Int) -> String {
    let digits = String(number, radix: 16)
    return String(repeating: "0", count: max(0, width - digits.count)) + digits
}
