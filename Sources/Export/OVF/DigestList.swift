import FlotillaProtocol
import HostKit
import MigrationModel

/// An OVF package's manifest file (.mf): `SHA256(disk1.vmdk)= 9f…` per file.
struct DigestList {
    struct Entry {
        let file: String
        let algorithm: Digest.Algorithm
        /// Lower case.
        let hex: String
        let line: Int
    }

    static let sizeLimit = 4 << 20
    let name: String
    private(set) var entries: [Entry] = []

    init(_ bytes: [UInt8], name: String) throws {
        self.name = name
        guard let text = String(validating: bytes, as: UTF8.self) else {
            throw MigrationError(.invalidArgument, "\(name): is not UTF-8 text")
        }
        for (index, line) in text.split(omittingEmptySubsequences: false, whereSeparator: \.isNewline).enumerated() {
            let line = String(line).trimmed
            if line.isEmpty { continue }
            func refuse(_ why: String) -> MigrationError {
                MigrationError(
                    .invalidArgument, "\(name): line \(index + 1): \(why): '\(line.printable)'",
                    hint: "each line reads SHA256(file)= digest")
            }
            // A name may hold parentheses and equal signs, a digest never does.
            guard let open = line.firstIndex(of: "("), let equals = line.lastIndex(of: "=") else {
                throw refuse("malformed")
            }
            let before = String(line[..<equals]).trimmed
            guard before.hasSuffix(")"), open < before.index(before: before.endIndex) else { throw refuse("malformed") }
            let label = String(line[..<open]).trimmed.lowercased().filter { $0 != "-" }
            guard let algorithm = Digest.Algorithm(rawValue: label) else { throw refuse("unknown digest algorithm") }
            let file = String(before[before.index(after: open)...].dropLast()).trimmed
            let digest = String(line[line.index(after: equals)...]).trimmed.lowercased()
            guard digest.utf8.count == 2 * algorithm.length, digest.allSatisfy({ $0.isASCII && $0.isHexDigit }) else {
                throw refuse("a \(label) digest has \(2 * algorithm.length) hexadecimal digits")
            }
            if let known = entries.first(where: { $0.file == file && $0.algorithm == algorithm }) {
                guard known.hex == digest else { throw refuse("contradicts line \(known.line)") }
                continue
            }
            guard entries.count < 1000 else { throw refuse("more than 1,000 files") }
            entries.append(Entry(file: file, algorithm: algorithm, hex: digest, line: index + 1))
        }
    }

    func expected(for file: String) -> [ExpectedDigest] {
        entries.filter { $0.file == file }.map { entry in
            var digest = ExpectedDigest()
            digest.algorithm = entry.algorithm.rawValue
            digest.hex = entry.hex
            return digest
        }
    }

    /// Throws `dataLoss` with both digests when the bytes are not those the list promises.
    func verify(_ bytes: [UInt8], file: String) throws {
        for entry in entries where entry.file == file {
            let actual = hex(Digest.hash(entry.algorithm, bytes))
            guard actual == entry.hex else {
                throw MigrationError(
                    .dataLoss,
                    "\(name): \(file.printable) has the \(entry.algorithm) digest \(actual), line \(entry.line) says "
                        + entry.hex,
                    hint: "copy or export the VM again; delete the .mf file if you edited the OVF yourself")
            }
        }
    }
}
