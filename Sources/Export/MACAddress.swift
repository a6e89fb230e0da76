package import FlotillaProtocol
import MigrationModel

/// Lower case with colons, from colons, dashes or none.
///
/// - Throws: `invalidArgument` for text that isn't the address of one Ethernet interface.
package func normalizedMAC(_ text: String, owner: String) throws -> String {
    let digits = text.unicodeScalars.filter { $0 != ":" && $0 != "-" }
    let separators = text.unicodeScalars.count - digits.count
    guard digits.count == 12, separators == 5 || separators == 0,
        digits.allSatisfy({ $0.properties.isASCIIHexDigit }),
        let first = UInt8(String(String.UnicodeScalarView(digits.prefix(2))), radix: 16)
    else {
        throw MigrationError(.invalidArgument, "\(owner): '\(text.printable)' is not a MAC address")
    }
    let plain = Array(String(String.UnicodeScalarView(digits)).lowercased())
    guard first & 1 == 0, plain.contains(where: { $0 != "0" }) else {
        throw MigrationError(
            .invalidArgument, "\(owner): \(text.printable) is no interface's MAC address (multicast or zero)")
    }
    return stride(from: 0, to: 12, by: 2).map { String(plain[$0...($0 + 1)]) }.joined(separator: ":")
}

extension Manifest {
    /// Throws `invalidArgument` when two NICs have one address: a bridge would mix up their frames.
    package func checkDistinctMACs(_ source: String) throws {
        var owners: [String: String] = [:]
        for nic in nics where !nic.mac.isEmpty {
            if let other = owners.updateValue(nic.id, forKey: nic.mac) {
                throw MigrationError(
                    .invalidArgument, "\(source): \(other) and \(nic.id) have the same MAC address \(nic.mac)",
                    hint: "give one of them another address on the source")
            }
        }
    }
}
