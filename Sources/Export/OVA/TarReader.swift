import Glibc
import HostKit
import MigrationModel

/// One regular file inside a tar archive.
struct TarMember: Sendable {
    let name: String
    /// Where its bytes start in the archive.
    let offset: UInt64
    let length: UInt64
}

/// Lists the members of a tar archive (POSIX ustar, with pax `path` and `size` records and GNU long names) without
/// reading their contents. Stricter than tar(1): an OVA holds plain files with plain names, anything else is refused.
struct TarReader {
    static let memberLimit = 10_000
    private static let block: UInt64 = 512
    /// Long names and pax records together; a name has at most 4 KiB.
    private static let extensionLimit: UInt64 = 64 << 10

    let file: File
    let size: UInt64

    init(_ file: File) throws {
        self.file = file
        size = try file.size
    }

    func members() throws -> [TarMember] {
        var members: [TarMember] = []
        var names: Set<String> = []
        var position: UInt64 = 0
        var longName: String?
        var pax = PaxRecords()
        var headers = 0
        while position < size {
            guard size - position >= Self.block else {
                throw MigrationError(
                    .dataLoss,
                    "\(file.path): truncated: \(size - position) bytes of a 512-byte header at byte \(position)",
                    hint: "copy or download the archive again")
            }
            let bytes = try file.readExactly(at: position, count: Int(Self.block))
            if bytes.allSatisfy({ $0 == 0 }) { break }
            headers += 1
            // Long names take three headers a member.
            guard headers <= 4 * Self.memberLimit, members.count < Self.memberLimit else {
                throw refuse("has more than \(Self.memberLimit) members", at: position)
            }
            let header = try TarHeader(bytes, archive: file.path, position: position)
            let data = position + Self.block
            switch header.type {
            case UInt8(ascii: "L"):
                let content = try extensionData(header, at: data)
                longName = try text(content.prefix { $0 != 0 }, at: position)
                position = data + padded(header.size)
                continue
            case UInt8(ascii: "x"):
                pax = try PaxRecords(try extensionData(header, at: data), archive: file.path, position: position)
                position = data + padded(header.size)
                continue
            case UInt8(ascii: "g"):
                let global = try PaxRecords(
                    try extensionData(header, at: data), archive: file.path, position: position)
                guard global.path == nil, global.size == nil else {
                    throw refuse("has a global header that sets a name or size for all members", at: position)
                }
                position = data + padded(header.size)
                continue
            default: break
            }
            let name = try plain(pax.path ?? longName ?? header.name, at: position)
            let length = pax.size ?? header.size
            (longName, pax) = (nil, PaxRecords())
            guard length <= size - data else {
                throw MigrationError(
                    .dataLoss,
                    "\(file.path): truncated: member \(name.printable) has \(length) bytes and "
                        + "\(length - (size - data)) of them are missing",
                    hint: "copy or download the archive again")
            }
            switch header.type {
            case 0, UInt8(ascii: "0"), UInt8(ascii: "7"):
                guard names.insert(name).inserted else {
                    throw refuse("has two members named \(name.printable)", at: position)
                }
                members.append(TarMember(name: name, offset: data, length: length))
            case UInt8(ascii: "5"): break
            case let type:
                throw refuse("member \(name.printable) is \(TarHeader.describe(type)), not a plain file", at: position)
            }
            // A last member's padding may be cut; the loop then ends.
            position = data + padded(length)
        }
        return members
    }

    private func padded(_ length: UInt64) -> UInt64 { (length + Self.block - 1) / Self.block * Self.block }

    private func extensionData(_ header: TarHeader, at offset: UInt64) throws -> [UInt8] {
        guard header.size <= Self.extensionLimit else {
            throw refuse("has an extended header of \(header.size) bytes", at: offset - Self.block)
        }
        return try file.readExactly(at: offset, count: Int(header.size))
    }

    private func text(_ bytes: some Collection<UInt8>, at position: UInt64) throws -> String {
        guard let text = String(validating: bytes, as: UTF8.self) else {
            throw refuse("has a member whose name is not UTF-8", at: position)
        }
        return text
    }

    private func plain(_ given: String, at position: UInt64) throws -> String {
        var name = given
        while name.hasPrefix("./") { name.removeFirst(2) }
        while name.hasSuffix("/") && name.count > 1 { name.removeLast() }
        if name == "." || given == "./" { return "." }
        try SourceFolder.checkName(
            name, owner: "\(file.path): member at byte \(position)", remedy: "such an archive was not made by an export"
        )
        return name
    }

    private func refuse(_ why: String, at position: UInt64) -> MigrationError {
        MigrationError(.invalidArgument, "\(file.path): \(why) (header at byte \(position))")
    }
}
