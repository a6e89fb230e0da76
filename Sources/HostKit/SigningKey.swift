import COpenSSL
import Glibc
import MigrationModel

/// An Ed25519 public key (RFC 8032).
package struct PublicKey: Sendable, Hashable {
    /// 32 bytes.
    package let bytes: [UInt8]
    private let handle: KeyHandle

    package static func == (left: PublicKey, right: PublicKey) -> Bool { left.bytes == right.bytes }
    package func hash(into hasher: inout Hasher) { hasher.combine(bytes) }

    fileprivate init(_ handle: KeyHandle) {
        self.handle = handle
        bytes = handle.publicBytes
    }

    /// Reads a file that holds a PEM "PUBLIC KEY", as `openssl pkey -pubout` writes it.
    package init(path: String) throws { try self.init(pem: try Files.read(path, limit: 64 << 10), name: path) }

    /// - Parameter name: for messages.
    package init(pem: [UInt8], name: String) throws {
        guard let key = readPEM(pem, PEM_read_bio_PUBKEY), EVP_PKEY_get_id(key) == EVP_PKEY_ED25519 else {
            throw MigrationError(
                .invalidArgument, "\(name) holds no Ed25519 public key in PEM",
                hint: "make one with: openssl pkey -in KEY -pubout")
        }
        self.init(KeyHandle(owning: key))
    }

    /// The first 16 hexadecimal digits of the SHA-256 of the key's 32 bytes.
    package var id: String { hex(Digest.hash(.sha256, bytes).prefix(8)) }

    package var pem: [UInt8] { writePEM { PEM_write_bio_PUBKEY($0, handle.key) } }

    package func verifies(_ signature: [UInt8], of message: [UInt8]) -> Bool {
        guard let context = EVP_MD_CTX_new() else { return false }
        defer { EVP_MD_CTX_free(context) }
        guard EVP_DigestVerifyInit(context, nil, nil, nil, handle.key) == 1 else { return false }
        return EVP_DigestVerify(context, signature, signature.count, message, message.count) == 1
    }
}

/// An Ed25519 private key. Never printed, never leaves its file but into memory.
package struct SigningKey: Sendable {
    package let publicKey: PublicKey
    private let handle: KeyHandle

    private init(_ handle: KeyHandle) {
        self.handle = handle
        publicKey = PublicKey(handle)
    }

    /// A new key from the system's random source.
    package init() {
        var key: OpaquePointer?
        let context = EVP_PKEY_CTX_new_id(EVP_PKEY_ED25519, nil)
        defer { EVP_PKEY_CTX_free(context) }
        guard EVP_PKEY_keygen_init(context) == 1, EVP_PKEY_keygen(context, &key) == 1, let key else {
            preconditionFailure("OpenSSL makes no Ed25519 key")
        }
        self.init(KeyHandle(owning: key))
    }

    /// - Parameter seed: the 32 bytes of RFC 8032's private key.
    package init(seed: [UInt8]) throws {
        guard let key = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, nil, seed, seed.count) else {
            throw MigrationError(.invalidArgument, "an Ed25519 seed has 32 bytes, not \(seed.count)")
        }
        self.init(KeyHandle(owning: key))
    }

    /// Reads a PEM "PRIVATE KEY", as `openssl genpkey -algorithm ed25519` writes it. Throws `permissionDenied` when
    /// others can read the file.
    package init(path: String) throws {
        guard let key = readPEM(try Files.readSecret(path), PEM_read_bio_PrivateKey),
            EVP_PKEY_get_id(key) == EVP_PKEY_ED25519
        else {
            throw MigrationError(
                .invalidArgument, "\(path) holds no Ed25519 private key in PEM without a passphrase",
                hint: "make one with: openssl genpkey -algorithm ed25519 -out \(path)")
        }
        self.init(KeyHandle(owning: key))
    }

    package var pem: [UInt8] { writePEM { PEM_write_bio_PrivateKey($0, handle.key, nil, nil, 0, nil, nil) } }

    /// 64 bytes.
    package func sign(_ message: [UInt8]) -> [UInt8] {
        guard let context = EVP_MD_CTX_new() else { preconditionFailure("out of memory") }
        defer { EVP_MD_CTX_free(context) }
        precondition(EVP_DigestSignInit(context, nil, nil, nil, handle.key) == 1, "OpenSSL signs with no Ed25519 key")
        return [UInt8](unsafeUninitializedCapacity: 64) { buffer, count in
            count = 64
            precondition(EVP_DigestSign(context, buffer.baseAddress, &count, message, message.count) == 1)
        }
    }
}

/// Owns an `EVP_PKEY`, which OpenSSL lets any number of threads use as long as nobody changes it.
private final class KeyHandle: @unchecked Sendable {
    let key: OpaquePointer

    init(owning key: OpaquePointer) { self.key = key }

    deinit { EVP_PKEY_free(key) }

    var publicBytes: [UInt8] {
        [UInt8](unsafeUninitializedCapacity: 32) { buffer, count in
            count = 32
            precondition(EVP_PKEY_get_raw_public_key(key, buffer.baseAddress, &count) == 1)
        }
    }
}

private typealias PassphraseCallback =
    @convention(c) (UnsafeMutablePointer<CChar>?, Int32, Int32, UnsafeMutableRawPointer?) -> Int32
private typealias PEMReader = (
    OpaquePointer?, UnsafeMutablePointer<OpaquePointer?>?, PassphraseCallback?, UnsafeMutableRawPointer?
) -> OpaquePointer?

/// nil when the bytes hold no such thing, or an encrypted one: nobody is asked for a passphrase.
private func readPEM(_ bytes: [UInt8], _ read: PEMReader) -> OpaquePointer? {
    guard let memory = BIO_new_mem_buf(bytes, Int32(clamping: bytes.count)) else { return nil }
    defer { BIO_free(memory) }
    return read(memory, nil, { _, _, _, _ in -1 }, nil)
}

private func writePEM(_ write: (OpaquePointer) -> Int32) -> [UInt8] {
    guard let memory = BIO_new(BIO_s_mem()) else { preconditionFailure("out of memory") }
    defer { BIO_free(memory) }
    precondition(write(memory) == 1, "OpenSSL writes no PEM")
    return [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
        count = Int(BIO_read(memory, buffer.baseAddress, 4096))
    }
}
