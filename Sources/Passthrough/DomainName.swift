import HostKit

/// A libvirt domain name for a VM's name, whatever that holds. Kept as it is where possible; characters outside
/// letters, digits, `.`, `_`, `+` and `-` become `-`, the first is a letter or digit, and the whole has at most 64 bytes.
/// A name that had to be cut, lost letters or digits of other scripts, or has nothing left gets a digest of the
/// original, so that two such names stay apart.
///
/// libvirt itself only forbids `/` and newlines, but the name also becomes file names and command line arguments.
///
/// - Parameter tellsScriptsApart: false for the name that earlier versions made, which had no digest for lost letters.
package func domainName(for vmName: String, tellsScriptsApart: Bool = true) -> String {
    let limit = 64
    var name = ""
    var lostLetters = false
    for scalar in vmName.unicodeScalars.prefix(4096) {
        switch scalar {
        case "a"..."z", "A"..."Z", "0"..."9", ".", "_", "+", "-": name.unicodeScalars.append(scalar)
        default:
            if !name.hasSuffix("-") { name.append("-") }
            lostLetters = lostLetters || scalar.properties.isAlphabetic || scalar.properties.numericType != nil
        }
    }
    let trimmed = name.drop { !$0.isLetter && !$0.isNumber }
    let end = trimmed.lastIndex { $0.isLetter || $0.isNumber || $0 == "+" || $0 == "_" }
    let kept = end.map { trimmed[...$0] } ?? ""
    guard kept.isEmpty || kept.utf8.count > limit || lostLetters && tellsScriptsApart else { return String(kept) }
    let mark = hex(Digest.hash(.sha256, Array(vmName.utf8)).prefix(4))
    return kept.isEmpty ? "vm-\(mark)" : "\(kept.prefix(limit - 9))-\(mark)"
}

/// Whether `name` is one that `domainName(for:)` leaves alone: what an operator may ask for.
package func isValidDomainName(_ name: String) -> Bool { !name.isEmpty && domainName(for: name) == name }
