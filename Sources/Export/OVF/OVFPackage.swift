import Glibc
import HostKit
import MigrationModel

/// The files of an OVF package: in the OVF's folder, or members of an OVA.
struct OVFPackage {
    private enum Storage {
        case folder(SourceFolder)
        case archive([String: TarMember])
    }

    /// The OVF or OVA file.
    let path: String
    /// Name of the OVF envelope within the package.
    let descriptorName: String
    let descriptor: [UInt8]
    /// Something about the package worth telling, or nil.
    private(set) var remark: String?
    private let storage: Storage

    private static let remedy = "export the VM again; every file belongs into the OVF's own folder"

    /// A folder's OVF file.
    init(ovf path: String) throws {
        self.path = path
        let folder = SourceFolder(path: Files.parent(of: path))
        storage = .folder(folder)
        descriptorName = Files.name(of: path)
        descriptor = try Region.whole(path).read(limit: XMLDocument.sizeLimit, name: path)
    }

    init(ova path: String) throws {
        self.path = path
        let region = try Region.whole(path)
        guard region.length > 0 else { throw MigrationError(.dataLoss, "\(path): is empty") }
        let members = try TarReader(try File(path, O_RDONLY)).members()
        let envelopes = members.filter { $0.name.lowercased().hasSuffix(".ovf") }
        guard let envelope = envelopes.first else {
            throw MigrationError(
                .invalidArgument, "\(path): holds no .ovf file",
                hint: "an OVA is a tar archive whose first member is the .ovf")
        }
        guard envelopes.count == 1 else {
            throw MigrationError(
                .invalidArgument,
                "\(path): holds several .ovf files: "
                    + envelopes.prefix(5).map(\.name.printable).joined(separator: ", "))
        }
        if members.first?.name != envelope.name {
            remark = "the OVF is not the archive's first member, as the specification wants it"
        }
        storage = .archive(Dictionary(members.map { ($0.name, $0) }) { first, _ in first })
        descriptorName = envelope.name
        descriptor = try Region(path: path, offset: envelope.offset, length: envelope.length)
            .read(limit: XMLDocument.sizeLimit, name: "\(path): \(envelope.name)")
    }

    var folder: SourceFolder? {
        if case .folder(let folder) = storage { folder } else { nil }
    }

    func contains(_ name: String) -> Bool {
        switch storage {
        case .folder(let folder): folder.exists(name)
        case .archive(let members): members[name] != nil
        }
    }

    /// - Parameter owner: who names the file, for messages.
    func region(_ name: String, owner: String) throws -> Region {
        switch storage {
        case .folder(let folder): return try folder.file(name, owner: owner, remedy: Self.remedy)
        case .archive(let members):
            try SourceFolder.checkName(name, owner: owner, remedy: Self.remedy)
            guard let member = members[name] else {
                throw MigrationError(
                    .notFound, "\(owner): file \(name.printable) is not in \(path)", hint: "export the VM again")
            }
            return Region(path: path, offset: member.offset, length: member.length)
        }
    }

    /// The file a reference's `href` names: a relative URI without scheme, percent-encoded or not.
    func reference(_ href: String, owner: String) throws -> (name: String, region: Region) {
        guard !href.contains("://"), !href.lowercased().hasPrefix("file:") else {
            throw MigrationError(
                .invalidArgument, "\(owner): '\(href.printable)' is a URL; only files of the package are read",
                hint: "download the file into the OVF's folder and name it in the OVF")
        }
        let decoded = try Self.percentDecoded(href, owner: owner)
        // Some writers leave a name with a percent sign as it is.
        let name = !contains(decoded) && decoded != href && (try? region(href, owner: owner)) != nil ? href : decoded
        return (name, try region(name, owner: owner))
    }

    /// Companion of the envelope: same name, other extension; else the only one of an archive with that extension.
    func companion(_ suffix: String) throws -> String? {
        let stem = descriptorName.lowercased().hasSuffix(".ovf") ? String(descriptorName.dropLast(4)) : descriptorName
        if contains(stem + suffix) { return stem + suffix }
        guard case .archive(let members) = storage else { return nil }
        let others = members.keys.filter { $0.lowercased().hasSuffix(suffix) }
        guard others.count < 2 else {
            throw MigrationError(
                .invalidArgument,
                "\(path): of its \(others.count) \(suffix) files none is called \((stem + suffix).printable)",
                hint: "nothing tells which counts: export the VM again, or leave out those that are not of this OVF")
        }
        return others.first
    }

    private static func percentDecoded(_ text: String, owner: String) throws -> String {
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            let digits = String(decoding: rest.prefix(2), as: UTF8.self)
            if byte == UInt8(ascii: "%"), digits.utf8.count == 2, digits.allSatisfy(\.isHexDigit),
                let value = UInt8(digits, radix: 16)
            {
                bytes.append(value)
                rest = rest.dropFirst(2)
            } else {
                bytes.append(byte)
            }
        }
        guard let decoded = String(validating: bytes, as: UTF8.self) else {
            throw MigrationError(.invalidArgument, "\(owner): file name '\(text.printable)' is not UTF-8")
        }
        return decoded
    }
}

extension Region {
    /// All of a regular file the user named.
    static func whole(_ path: String) throws -> Region {
        // Not blocking: a FIFO would hold the open until someone writes to it.
        let info = try File(path, O_RDONLY | O_NONBLOCK).status()
        guard info.st_mode & S_IFMT == S_IFREG else {
            throw MigrationError(.invalidArgument, "\(path): is not a regular file")
        }
        return Region(path: path, offset: 0, length: UInt64(info.st_size))
    }
}
