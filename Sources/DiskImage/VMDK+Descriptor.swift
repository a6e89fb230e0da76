import MigrationModel

extension VMDK {
    /// The text that describes a disk.
    struct Descriptor: Sendable, Equatable {
        struct ExtentLine: Sendable, Equatable {
            enum Kind: Sendable { case flat, sparse, zero }
            let kind: Kind
            let sectors: UInt64
            /// As written, unchecked; empty for `zero`.
            let fileName: String
            /// The sector in the file where a flat extent begins.
            let offset: UInt64
        }

        let createType: String
        /// Lower case; changes whenever the disk's content does.
        let cid: String
        /// Lower case; `ffffffff` for a disk that stands alone.
        let parentCID: String
        /// As written, unchecked: the parent's descriptor, perhaps with a path on the machine it came from.
        let parentHint: String?
        /// vSphere's VM encryption is an I/O filter on the disk.
        let isEncrypted: Bool
        let extents: [ExtentLine]

        /// - Parameter bytes: may be padded with NULs.
        init(parsing bytes: [UInt8], name: String) throws {
            guard VMDK.isDescriptor(bytes) else { throw MigrationError.malformed(name, "not a disk descriptor") }
            var values: [String: String] = [:]
            var extents: [ExtentLine] = []
            for raw in bytes.prefix(while: { $0 != 0 }).split(whereSeparator: { $0 == 0x0A || $0 == 0x0D }) {
                let line = trim(Substring(decoding: raw, as: UTF8.self))
                if line.isEmpty || line.hasPrefix("#") { continue }
                if let extent = try Descriptor.extent(line, name: name) {
                    extents.append(extent)
                } else if let equals = line.firstIndex(of: "=") {
                    let key = trim(line[..<equals]).lowercased()
                    values[key] = unquote(trim(line[line.index(after: equals)...]))
                }
            }
            createType = values["createtype"] ?? ""
            cid = (values["cid"] ?? "").lowercased()
            parentHint = values["parentfilenamehint"]
            parentCID = (values["parentcid"] ?? "ffffffff").lowercased()
            isEncrypted = values["ddb.iofilters"]?.lowercased().contains("vmcrypt") ?? false
            self.extents = extents
        }

        var isDelta: Bool { parentCID != "ffffffff" }

        /// Throws unless this is a complete disk of a kind that is read here.
        func requireWholeDisk(name: String) throws {
            guard !isDelta else {
                throw MigrationError(
                    .failedPrecondition,
                    "\(name): a snapshot's delta (parent CID \(VMDK.printable(parentCID))), not a whole disk",
                    hint: "consolidate the VM's snapshots, or export it, and give the resulting disk")
            }
            try requireKnownKind(name: name)
        }

        /// Throws unless this is a disk, or a delta, of a kind that is read here.
        func requireKnownKind(name: String) throws {
            guard !isEncrypted else {
                throw MigrationError(
                    .failedPrecondition, "\(name): the disk is encrypted",
                    hint: "decrypt it by changing the VM's storage policy, then export again")
            }
            switch createType.lowercased() {
            case "monolithicsparse", "monolithicflat", "twogbmaxextentsparse", "twogbmaxextentflat", "streamoptimized",
                "vmfs", "vmfsthin", "vmfseagerzeroedthick", "vmfspreallocated":
                return
            case "sesparse", "vmfssparse":
                throw MigrationError(
                    .unimplemented, "\(name): \(createType) snapshot deltas aren't read here",
                    hint: "consolidate the VM's snapshots, then export again")
            case let type where type.contains("rdm") || type.contains("raw") || type.contains("device"):
                throw MigrationError(
                    .unimplemented, "\(name): \(VMDK.printable(createType)) maps a physical disk",
                    hint: "copy the disk itself as a raw image, or convert it to a virtual disk in vSphere")
            default:
                throw MigrationError(
                    .unimplemented, "\(name): disk type \"\(VMDK.printable(createType))\" isn't read here",
                    hint: "clone it to a thin or streamOptimized disk first")
            }
        }

        /// `RW 63 SPARSE "disk-s001.vmdk"`, `RW 63 FLAT "disk-flat.vmdk" 0`; nil for lines of another kind.
        private static func extent(_ line: Substring, name: String) throws -> ExtentLine? {
            let words = line.split(maxSplits: 3, whereSeparator: { $0 == " " || $0 == "\t" })
            guard let access = words.first?.uppercased(), ["RW", "RDONLY", "NOACCESS"].contains(access) else {
                return nil
            }
            func malformed(_ what: String) -> MigrationError {
                .malformed(name, "extent line \"\(VMDK.printable(line))\": \(what)")
            }
            guard access != "NOACCESS" else { throw malformed("the extent isn't accessible") }
            guard words.count >= 3 else { throw malformed("incomplete") }
            guard let sectors = UInt64(words[1]), sectors > 0, sectors <= Chunk.maximumCapacity / sectorSize else {
                throw malformed("the sector count is out of range")
            }
            let kind: ExtentLine.Kind
            switch words[2].uppercased() {
            case "FLAT", "VMFS": kind = .flat
            case "SPARSE": kind = .sparse
            case "ZERO": return ExtentLine(kind: .zero, sectors: sectors, fileName: "", offset: 0)
            case let other:
                throw MigrationError(
                    .unimplemented, "\(name): extents of kind \(VMDK.printable(other)) aren't read here",
                    hint: "consolidate the VM's snapshots or clone the disk, then export again")
            }
            guard words.count == 4, words[3].first == "\"", let end = words[3].dropFirst().firstIndex(of: "\"") else {
                throw malformed("no file name in quotes")
            }
            let rest = trim(words[3][words[3].index(after: end)...])
            guard let offset = rest.isEmpty ? 0 : UInt64(rest), offset <= Chunk.maximumCapacity / sectorSize else {
                throw malformed("the offset is out of range")
            }
            guard kind == .flat || offset == 0 else { throw malformed("a sparse extent has no offset") }
            return ExtentLine(
                kind: kind, sectors: sectors, fileName: String(words[3].dropFirst()[..<end]), offset: offset)
        }
    }
}

private func trim(_ text: Substring) -> Substring {
    var text = text
    while let first = text.first, first.isWhitespace || first == "\u{FEFF}" { text.removeFirst() }
    while let last = text.last, last.isWhitespace { text.removeLast() }
    return text
}

private func unquote(_ text: Substring) -> String {
    guard text.count >= 2, text.first == "\"", text.last == "\"" else { return String(text) }
    return String(text.dropFirst().dropLast())
}
