import MigrationModel

/// The records of a pax extended header that matter to a reader of plain files (POSIX.1-2001, "pax Extended Header").
struct PaxRecords {
    var path: String?
    var size: UInt64?

    init() {}

    init(_ bytes: [UInt8], archive: String, position: UInt64) throws {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(.invalidArgument, "\(archive): \(why) in the pax header at byte \(position)")
        }
        var rest = bytes[...]
        while !rest.isEmpty {
            let digits = rest.prefix { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }
            // The length counts its own digits, the space and the newline.
            guard let length = Int(String(decoding: digits, as: UTF8.self)), length > digits.count + 2,
                length <= rest.count, rest[digits.endIndex] == UInt8(ascii: " ")
            else { throw refuse("malformed record length") }
            let record = rest[(digits.endIndex + 1)..<(rest.startIndex + length)]
            rest = rest[record.endIndex...]
            guard record.last == UInt8(ascii: "\n"), let equals = record.firstIndex(of: UInt8(ascii: "=")),
                let key = String(validating: record[..<equals], as: UTF8.self),
                let value = String(validating: record[(equals + 1)..<(record.endIndex - 1)], as: UTF8.self)
            else { throw refuse("malformed record") }
            switch key {
            case "path": path = value
            case "size":
                guard let number = UInt64(value), number <= UInt64(Int64.max) else {
                    throw refuse("unusable size '\(value.printable)'")
                }
                size = number
            case "linkpath": throw refuse("a link")
            case let key where key.hasPrefix("GNU.sparse."): throw refuse("a sparse member")
            default: break
            }
        }
    }
}
