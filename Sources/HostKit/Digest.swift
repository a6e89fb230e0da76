import COpenSSL

/// An incremental message digest through OpenSSL, which uses the CPU's SHA instructions. One thread at a time.
package final class Digest {
    package enum Algorithm: String, Sendable {
        case sha1, sha256, sha512

        /// Digest length in bytes.
        package var length: Int {
            switch self {
            case .sha1: 20
            case .sha256: 32
            case .sha512: 64
            }
        }
    }

    private let context: OpaquePointer
    private let algorithm: Algorithm

    package init(_ algorithm: Algorithm = .sha256) {
        guard let context = EVP_MD_CTX_new() else { preconditionFailure("out of memory") }
        self.context = context
        self.algorithm = algorithm
        let type =
            switch algorithm {
            case .sha1: EVP_sha1()
            case .sha256: EVP_sha256()
            case .sha512: EVP_sha512()
            }
        precondition(EVP_DigestInit_ex(context, type, nil) == 1, "OpenSSL has no \(algorithm)")
    }

    deinit { EVP_MD_CTX_free(context) }

    package func update(_ bytes: UnsafeRawBufferPointer) {
        EVP_DigestUpdate(context, bytes.baseAddress, bytes.count)
    }

    package func update(_ bytes: [UInt8]) { bytes.withUnsafeBytes { update($0) } }

    /// Ends the digest; further updates are an error.
    package func finalize() -> [UInt8] {
        [UInt8](unsafeUninitializedCapacity: algorithm.length) { buffer, count in
            EVP_DigestFinal_ex(context, buffer.baseAddress, nil)
            count = algorithm.length
        }
    }

    package static func hash(_ algorithm: Algorithm = .sha256, _ bytes: [UInt8]) -> [UInt8] {
        let digest = Digest(algorithm)
        digest.update(bytes)
        return digest.finalize()
    }
}

/// Lower-case hexadecimal.
package func hex(_ bytes: some Sequence<UInt8>) -> String {
    let digits = Array("0123456789abcdef".utf8)
    var text: [UInt8] = []
    for byte in bytes {
        text.append(digits[Int(byte >> 4)])
        text.append(digits[Int(byte & 15)])
    }
    return String(decoding: text, as: UTF8.self)
}
