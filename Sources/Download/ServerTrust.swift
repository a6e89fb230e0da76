import MigrationModel

/// Why a TLS server is believed to be who it says.
package enum ServerTrust: Sendable, Hashable {
    /// An authority of the system signed its certificate for this host name.
    case system
    /// One of the authorities in this PEM file did.
    case authorities(String)
    /// Its certificate is this very one.
    case fingerprint(CertificateFingerprint)
}

/// Digest of a certificate's DER form.
package struct CertificateFingerprint: Sendable, Hashable, CustomStringConvertible {
    package enum Algorithm: Int, Sendable {
        case sha1 = 20
        case sha256 = 32
    }

    package let algorithm: Algorithm
    let bytes: [UInt8]

    /// - Parameter text: hexadecimal, with or without colons.
    /// - Throws: `invalidArgument`.
    package init(_ text: String, _ algorithm: Algorithm) throws {
        let digits = Array(text.utf8.filter { $0 != UInt8(ascii: ":") })
        let pairs = stride(from: 0, to: digits.count - digits.count % 2, by: 2)
        bytes = pairs.compactMap { UInt8(String(decoding: digits[$0..<$0 + 2], as: UTF8.self), radix: 16) }
        self.algorithm = algorithm
        guard digits.count == 2 * algorithm.rawValue, bytes.count == algorithm.rawValue else {
            throw MigrationError(
                .invalidArgument, "'\(text.prefix(120))' is not the \(algorithm) fingerprint of a certificate",
                hint: "it has \(algorithm.rawValue) bytes in hexadecimal, as `openssl x509 -noout -fingerprint "
                    + "-\(algorithm)` prints it")
        }
    }

    init(_ bytes: [UInt8], _ algorithm: Algorithm) { (self.bytes, self.algorithm) = (bytes, algorithm) }

    package var description: String {
        bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16, uppercase: true) }.joined(separator: ":")
    }
}
