import Export
import MigrationModel

/// `vsphere://USER@HOST[:PORT][/DATACENTER][?vm=NAME&snapshot=1&via=datastore]`, or `&staged=1` in place of the last.
/// USER may hold '@' itself. Parts are percent-encoded where needed. Never holds a password.
package struct VSphereURL: Sendable, Hashable, CustomStringConvertible {
    package var user: String
    /// "vcenter.example" or "vcenter.example:8443".
    package var authority: String
    /// Name of the data centre, or its path through folders; nil for all.
    package var datacenter: String?
    /// Name or managed object id ("vm-42").
    package var vm: String?
    /// Move a running VM as a snapshot finds it.
    package var snapshot = false
    package var transfer = Transfer.nfc
    /// Keep the disks' files as they come (streamOptimized VMDK), beside the images made of them.
    package var isStaged = false

    /// How the disks are read.
    package enum Transfer: String, Sendable, CaseIterable {
        /// Compressed, front to back, under a lease that keeps the VM from starting.
        case nfc
        /// Flat files of the datastore in ranges, in parallel; an interrupted run goes on.
        case datastore
    }

    package static func isOne(_ text: String) -> Bool { text.hasPrefix("vsphere:") }

    package init(parsing text: String) throws {
        func refuse(_ why: String) -> MigrationError {
            MigrationError(
                .invalidArgument, "source '\(text.withoutPassword.printable)' \(why)",
                hint: "give vsphere://USER@HOST/DATACENTER, for example "
                    + "vsphere://administrator@vsphere.local@vcenter.example/DC1")
        }
        guard text.hasPrefix("vsphere://"), text.utf8.count < 4096 else { throw refuse("is not a vSphere URL") }
        let rest = text.dropFirst("vsphere://".count)
        guard !rest.contains("#") else { throw refuse("has a fragment") }
        let question = rest.firstIndex(of: "?") ?? rest.endIndex
        let slash = rest[..<question].firstIndex(of: "/") ?? question
        let account = rest[..<slash]
        guard let at = account.lastIndex(of: "@"), at != account.startIndex else { throw refuse("names no user") }
        guard !account[..<at].contains(":") else {
            throw MigrationError(
                .invalidArgument,
                "source '\(text.withoutPassword.printable)' has a password, which others can see",
                hint: "put the password into a file that only you can read, and name it with --password-file")
        }
        guard let user = Self.decoded(account[..<at]) else { throw refuse("has a user that is not UTF-8") }
        let host = account[account.index(after: at)...]
        let isHost = host.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || "-._:[]".contains($0)) }
        guard !host.isEmpty, isHost else { throw refuse("names no host") }
        guard let path = Self.decoded(rest[slash..<question]) else { throw refuse("has a path that is not UTF-8") }
        self.user = user
        authority = host.lowercased()
        let folders = path.split(separator: "/").joined(separator: "/")
        datacenter = folders.isEmpty ? nil : folders
        for item in rest[question...].dropFirst().split(separator: "&") {
            let parts = item.split(separator: "=", maxSplits: 1)
            guard parts.count == 2, let value = Self.decoded(parts[1]), !value.isEmpty else {
                throw refuse("has a parameter without a value")
            }
            switch (parts[0], value) {
            case ("vm", _): vm = value
            case ("snapshot", "1"): snapshot = true
            case ("snapshot", "0"): snapshot = false
            case ("staged", "1"): isStaged = true
            case ("staged", "0"): isStaged = false
            case ("via", _):
                guard let transfer = Transfer(rawValue: value) else {
                    throw refuse("has a via= other than nfc, datastore")
                }
                self.transfer = transfer
            default:
                throw refuse("has the unknown parameter '\(String(parts[0]).printable)=\(value.printable)'")
            }
        }
        guard !isStaged || transfer == .nfc else { throw refuse("has staged=1, which goes with via=nfc") }
    }

    /// Canonical: equal sources have equal texts.
    package var description: String {
        var parameters: [String] = []
        if let vm { parameters.append("vm=\(Self.encoded(vm))") }
        if snapshot { parameters.append("snapshot=1") }
        if isStaged { parameters.append("staged=1") }
        if transfer != .nfc { parameters.append("via=\(transfer.rawValue)") }
        let path = datacenter.map { "/" + Self.encoded($0, besides: "/") } ?? "/"
        return "vsphere://\(Self.encoded(user, besides: "@"))@\(authority)\(path)"
            + (parameters.isEmpty ? "" : "?" + parameters.joined(separator: "&"))
    }

    static func encoded(_ text: String, besides: String = "") -> String {
        let digits = Array("0123456789ABCDEF")
        var result = ""
        for byte in text.utf8 {
            let character = Character(Unicode.Scalar(byte))
            if byte < 128,
                character.isLetter || character.isNumber || "-._~".contains(character) || besides.contains(character)
            {
                result.append(character)
            } else {
                result += "%\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
            }
        }
        return result
    }

    /// nil for a bad escape, a NUL, or bytes that aren't UTF-8.
    static func decoded(_ text: Substring) -> String? {
        var bytes: [UInt8] = []
        var rest = text.utf8[...]
        while let byte = rest.popFirst() {
            guard byte == UInt8(ascii: "%") else {
                bytes.append(byte)
                continue
            }
            let digits = String(decoding: rest.prefix(2), as: UTF8.self)
            guard digits.utf8.count == 2, digits.allSatisfy(\.isHexDigit), let value = UInt8(digits, radix: 16),
                value != 0
            else { return nil }
            bytes.append(value)
            rest = rest.dropFirst(2)
        }
        return String(validating: bytes, as: UTF8.self)
    }
}
