import MigrationModel

/// One 512-byte header block (POSIX.1-1988 ustar; GNU's base-256 numbers).
struct TarHeader {
    let name: String
    let size: UInt64
    let type: UInt8

    init(_ bytes: [UInt8], archive: String, position: UInt64) throws {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(
                .invalidArgument, "\(archive): \(why) in the tar header at byte \(position)",
                hint: "an OVA is an uncompressed tar archive; copy or download it again")
        }
        // The sum counts its own field as spaces; some old writers summed signed bytes.
        var unsigned = 0
        var signed = 0
        for (index, byte) in bytes.enumerated() {
            let value = (148..<156).contains(index) ? UInt8(ascii: " ") : byte
            unsigned += Int(value)
            signed += Int(Int8(bitPattern: value))
        }
        guard let stated = Self.octal(bytes[148..<156]), Int(stated) == unsigned || Int(stated) == signed else {
            throw refuse("wrong checksum")
        }
        guard let size = Self.number(bytes[124..<136]) else { throw refuse("unusable size field") }
        var path = bytes[0..<100].prefix { $0 != 0 }
        if bytes[257..<263].elementsEqual("ustar\0".utf8) {
            let prefix = bytes[345..<500].prefix { $0 != 0 }
            if !prefix.isEmpty { path = prefix + [UInt8(ascii: "/")] + path }
        }
        guard let name = String(validating: path, as: UTF8.self) else { throw refuse("name is not UTF-8") }
        self.name = name
        self.size = size
        type = bytes[156]
    }

    /// Octal digits between optional spaces, or GNU's big-endian binary form; nil when it is neither or exceeds 2^63-1.
    private static func number(_ field: ArraySlice<UInt8>) -> UInt64? {
        guard let first = field.first, first & 0x80 != 0 else { return octal(field) }
        // 0xff starts a negative number.
        guard first == 0x80 else { return nil }
        var value: UInt64 = 0
        for byte in field.dropFirst() {
            guard value >> 55 == 0 else { return nil }
            value = value << 8 | UInt64(byte)
        }
        return value
    }

    private static func octal(_ field: ArraySlice<UInt8>) -> UInt64? {
        let digits = field.drop { $0 == UInt8(ascii: " ") }.prefix { $0 != 0 && $0 != UInt8(ascii: " ") }
        let rest = field[digits.endIndex...]
        guard rest.allSatisfy({ $0 == 0 || $0 == UInt8(ascii: " ") }) else { return nil }
        var value: UInt64 = 0
        for digit in digits {
            guard (UInt8(ascii: "0")...UInt8(ascii: "7")).contains(digit), value >> 60 == 0 else { return nil }
            value = value << 3 | UInt64(digit - UInt8(ascii: "0"))
        }
        return value
    }

    static func describe(_ type: UInt8) -> String {
        switch type {
        case UInt8(ascii: "1"): "a hard link"
        case UInt8(ascii: "2"): "a symbolic link"
        case UInt8(ascii: "3"), UInt8(ascii: "4"): "a device"
        case UInt8(ascii: "6"): "a FIFO"
        case UInt8(ascii: "K"): "a long link name"
        case UInt8(ascii: "S"): "a sparse file"
        default: "of the unknown type 0x\(String(type, radix: 16))"
        }
    }
}
