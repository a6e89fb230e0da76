import Crypto
import Foundation
import HostKit
import Messaging
import MigrationModel
import SwiftASN1
import X509

/// The fleet's own certificate authority. Its certificates are worth something to the fleet's broker and members alone.
struct Authority {
    enum Purpose {
        /// Logs in to the broker; the common name is the broker user.
        case client
        /// A broker node; the name is its DNS name.
        case server
    }

    private let certificate: Certificate
    private let key: Certificate.PrivateKey

    private static let lifetime: TimeInterval = 10 * 365 * 86400
    /// Of what it signs; renewing is enrolling again.
    private static let memberLifetime: TimeInterval = 2 * 365 * 86400

    private init(_ certificate: Certificate, _ key: Certificate.PrivateKey) {
        (self.certificate, self.key) = (certificate, key)
    }

    /// Reads the authority of a folder.
    init(_ folder: FleetFolder) throws {
        guard Files.exists(folder.authorityKey) else {
            throw MigrationError(
                .failedPrecondition, "\(folder.path) holds no certificate authority",
                hint: "make one with: flotilla fleet init --dir \(folder.path)")
        }
        certificate = try Self.reading(folder.authority) {
            try Certificate(pemEncoded: String(decoding: try Files.read(folder.authority), as: UTF8.self))
        }
        key = try Self.reading(folder.authorityKey) {
            try Certificate.PrivateKey(
                pemEncoded: String(decoding: try Files.readSecret(folder.authorityKey), as: UTF8.self))
        }
    }

    /// Makes one, unless the folder has one. The key comes last: where it is, the certificate is too.
    static func make(in folder: FleetFolder) throws -> Authority {
        guard !Files.exists(folder.authorityKey) else { return try Authority(folder) }
        guard !Files.exists(folder.certificate) else {
            throw MigrationError(
                .failedPrecondition,
                "\(folder.certificate) was signed by an authority whose key, \(folder.authorityKey), is not there",
                hint: "put the key back, or name another folder with --dir: a host's is not the coordinator's")
        }
        let key = P256.Signing.PrivateKey()
        let name = try DistinguishedName { CommonName("Flotilla fleet") }
        let certificate = try Certificate(
            version: .v3, serialNumber: Certificate.SerialNumber(), publicKey: .init(key.publicKey),
            notValidBefore: .now - 300, notValidAfter: .now + lifetime, issuer: name, subject: name,
            signatureAlgorithm: .ecdsaWithSHA256,
            extensions: Certificate.Extensions {
                Critical(BasicConstraints.isCertificateAuthority(maxPathLength: 0))
                Critical(KeyUsage(keyCertSign: true, cRLSign: true))
            },
            issuerPrivateKey: .init(key))
        try folder.write(try pem(certificate), to: folder.authority, mode: 0o644)
        try folder.write(Array(key.pemRepresentation.utf8) + [10], to: folder.authorityKey, mode: 0o600)
        return Authority(certificate, .init(key))
    }

    /// A certificate in PEM.
    func issue(_ name: String, _ purpose: Purpose, for publicKey: Certificate.PublicKey) throws -> [UInt8] {
        try Self.pem(
            Certificate(
                version: .v3, serialNumber: Certificate.SerialNumber(), publicKey: publicKey,
                notValidBefore: .now - 300, notValidAfter: .now + Self.memberLifetime, issuer: certificate.subject,
                subject: DistinguishedName { CommonName(name) }, signatureAlgorithm: .ecdsaWithSHA256,
                extensions: Certificate.Extensions {
                    Critical(BasicConstraints.notCertificateAuthority)
                    Critical(KeyUsage(digitalSignature: true))
                    try ExtendedKeyUsage(purpose == .client ? [.clientAuth] : [.serverAuth])
                    SubjectAlternativeNames([.dnsName(name)])
                },
                issuerPrivateKey: key))
    }

    private static func pem(_ certificate: Certificate) throws -> [UInt8] {
        Array(try certificate.serializeAsPEM().pemString.utf8) + [10]
    }

    private static func reading<Value>(_ path: String, _ body: () throws -> Value) throws -> Value {
        do { return try body() } catch let error as MigrationError { throw error } catch {
            throw MigrationError(.invalidArgument, "\(path) can't be read as PEM", cause: error)
        }
    }
}
