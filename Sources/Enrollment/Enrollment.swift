import Crypto
import Foundation
import HostKit
import Messaging
package import MigrationModel
import SwiftASN1
import X509

/// How a host joins a fleet, without a network of trust of its own: a request goes from the host to the coordinator, an
/// answer back, both as files in whatever way the operator trusts. Private keys never leave the machine they were made
/// on.
package enum Enrollment {
    /// What a host asks with. Proves that it has both private keys.
    package struct Request: Codable, Sendable {
        package var host: String
        /// PEM of the host's Ed25519 public key.
        var signingKey: String
        /// PKCS #10 in PEM for the host's TLS key.
        var certificateRequest: String
        /// Signature with the signing key over host and certificate request.
        var proof: Data

        fileprivate static func proven(_ host: String, _ certificateRequest: String) -> [UInt8] {
            Array("flotilla-enrollment-v1\n\(host)\n\(certificateRequest)".utf8)
        }
    }

    /// What the coordinator answers.
    package struct Answer: Codable, Sendable {
        package var host: String
        var certificate: String
        var authority: String
        /// PEM of the coordinator's Ed25519 public keys.
        var coordinatorKeys: [String]
    }

    /// Makes the coordinator's keys and the fleet's certificate authority; what is there stays, and what was interrupted is
    /// gone on with. Returns the id of the coordinator's signing key.
    @discardableResult
    package static func makeFleet(in folder: FleetFolder) throws -> String {
        try folder.prepare()
        let authority = try Authority.make(in: folder)
        let key = try folder.ownKey()
        try folder.trust(key.publicKey, of: FleetMember.coordinator)
        guard !Files.exists(folder.certificate) else { return key.publicKey.id }
        let tls = P256.Signing.PrivateKey()
        try folder.write(Array(tls.pemRepresentation.utf8) + [10], to: folder.tlsKey, mode: 0o600)
        try folder.write(
            authority.issue(FleetMember.coordinator, .client, for: .init(tls.publicKey)), to: folder.certificate,
            mode: 0o644)
        return key.publicKey.id
    }

    /// When the certificate of a PEM file ends.
    package static func expiry(ofCertificate path: String) throws -> Moment {
        let text = String(decoding: try Files.read(path, limit: 1 << 20), as: UTF8.self)
        do {
            let end = try Certificate(pemEncoded: text).notValidAfter
            return Moment(milliseconds: Int64(end.timeIntervalSince1970 * 1000))
        } catch {
            throw MigrationError(.invalidArgument, "\(path) holds no certificate in PEM", cause: error)
        }
    }

    /// Makes a certificate and key for a broker node of this DNS name: `target` with ".pem" and ".key". Throws
    /// `alreadyExists` when one of them is there.
    package static func brokerCertificate(
        _ name: String, in folder: FleetFolder, to target: String
    ) throws -> (certificate: String, key: String) {
        let files = (certificate: "\(target).pem", key: "\(target).key")
        for path in [files.certificate, files.key] where Files.exists(path) {
            throw MigrationError(.alreadyExists, "\(path) exists", hint: "move it away first")
        }
        let tls = P256.Signing.PrivateKey()
        let certificate = try Authority(folder).issue(name, .server, for: .init(tls.publicKey))
        try folder.write(Array(tls.pemRepresentation.utf8) + [10], to: files.key, mode: 0o600)
        try folder.write(certificate, to: files.certificate, mode: 0o644)
        return files
    }

    /// On the host: makes its keys if it has none, and the request. Returns the request as JSON and the id of its
    /// signing key, by which people on both ends can tell that it is the same.
    ///
    /// - Parameter newKeys: asks with others than it has, which lie beside those until `accept` puts them in their place: a
    ///   worker that runs loses nothing meanwhile.
    package static func ask(
        host: String, in folder: FleetFolder, newKeys: Bool = false
    ) throws -> (json: [UInt8], keyID: String) {
        guard FleetMember.isHostName(host) else {
            throw MigrationError(
                .invalidArgument, "'\(host)' can't name a host", hint: FleetMember.hostNameRule)
        }
        try folder.prepare()
        let key = try folder.ownKey(isNext: newKeys)
        let file = newKeys ? folder.nextTLSKey : folder.tlsKey
        let tls: Certificate.PrivateKey
        if Files.exists(file) {
            tls = try tlsKey(file)
        } else {
            let made = P256.Signing.PrivateKey()
            try folder.write(Array(made.pemRepresentation.utf8) + [10], to: file, mode: 0o600)
            tls = .init(made)
        }
        let wanted = try CertificateSigningRequest(
            version: .v1, subject: DistinguishedName { CommonName(host) }, privateKey: tls,
            attributes: CertificateSigningRequest.Attributes(), signatureAlgorithm: .ecdsaWithSHA256
        ).serializeAsPEM().pemString
        let request = Request(
            host: host, signingKey: String(decoding: key.publicKey.pem, as: UTF8.self), certificateRequest: wanted,
            proof: Data(key.sign(Request.proven(host, wanted))))
        return (try json(request), key.publicKey.id)
    }

    /// On the coordinator's machine: checks a request, believes the host's key from now on, and makes the answer.
    ///
    /// - Parameters:
    ///   - name: of the request's file, for messages.
    ///   - replaces: takes the host's earlier keys away; without it they stay valid beside the new one.
    package static func grant(
        _ request: [UInt8], named name: String = "the file", in folder: FleetFolder, replaces: Bool
    ) throws -> (json: [UInt8], host: String, keyID: String) {
        let wanted: Request
        let key: PublicKey
        let csr: CertificateSigningRequest
        do {
            wanted = try JSONDecoder().decode(Request.self, from: Data(request))
            key = try PublicKey(pem: Array(wanted.signingKey.utf8), name: "the request's signing key")
            csr = try CertificateSigningRequest(pemEncoded: wanted.certificateRequest)
        } catch {
            throw MigrationError(
                .invalidArgument, "\(name) holds no host's request to join\(found(in: request))",
                hint: "give it what this printed on the host: flotilla worker enroll --host NAME")
        }
        guard FleetMember.isHostName(wanted.host) else {
            throw MigrationError(
                .invalidArgument, "'\(wanted.host)' can't name a host", hint: FleetMember.hostNameRule)
        }
        guard key.verifies(Array(wanted.proof), of: Request.proven(wanted.host, wanted.certificateRequest)),
            csr.publicKey.isValidSignature(csr.signature, for: csr)
        else {
            throw MigrationError(
                .unauthenticated, "whoever made the request of \(wanted.host) does not have its keys",
                hint: "make it again on the host with: flotilla worker enroll")
        }
        let certificate = try Authority(folder).issue(wanted.host, .client, for: csr.publicKey)
        try folder.trust(key, of: wanted.host)
        if replaces { _ = try folder.distrust(wanted.host, except: key.id) }
        let keys = "\(folder.trusted)/\(FleetMember.coordinator)"
        let answer = Answer(
            host: wanted.host, certificate: String(decoding: certificate, as: UTF8.self),
            authority: String(decoding: try Files.read(folder.authority), as: UTF8.self),
            coordinatorKeys: try Files.list(keys).map {
                String(decoding: try Files.read("\(keys)/\($0)"), as: UTF8.self)
            })
        return (try json(answer), wanted.host, key.id)
    }

    /// On the host: takes the coordinator's answer, and the keys that it was asked with into use. Returns the id of the
    /// signing key if that is new.
    package static func accept(
        _ answer: [UInt8], named name: String = "the file", in folder: FleetFolder
    ) throws -> (host: String, newKeyID: String?) {
        let granted: Answer
        let certificate: Certificate
        let keys: [PublicKey]
        do {
            granted = try JSONDecoder().decode(Answer.self, from: Data(answer))
            certificate = try Certificate(pemEncoded: granted.certificate)
            keys = try granted.coordinatorKeys.map {
                try PublicKey(pem: Array($0.utf8), name: "the coordinator's key")
            }
        } catch {
            throw MigrationError(
                .invalidArgument, "\(name) holds no answer to a request to join\(found(in: answer))",
                hint: "give it what this printed on the coordinator's machine: flotilla host enroll REQUEST")
        }
        func isFor(_ file: String) throws -> Bool {
            try Files.exists(file) && certificate.publicKey == tlsKey(file).publicKey
        }
        let hasNewKeys = try isFor(folder.nextTLSKey)
        guard try hasNewKeys || isFor(folder.tlsKey) else {
            throw MigrationError(
                .failedPrecondition, "the answer is for other keys than those in \(folder.path)",
                hint: "make a new request with: flotilla worker enroll --host \(granted.host)")
        }
        for key in keys { try folder.trust(key, of: FleetMember.coordinator) }
        try folder.write(Array(granted.authority.utf8), to: folder.authority, mode: 0o644)
        var newKeyID: String?
        if hasNewKeys {
            let isMoved = !Files.exists(folder.nextSigningKey)
            newKeyID = try SigningKey(path: isMoved ? folder.signingKey : folder.nextSigningKey).publicKey.id
            // Last the one by which the answer is known to be for these.
            try folder.move(folder.nextSigningKey, to: folder.signingKey)
            try folder.move(folder.nextTLSKey, to: folder.tlsKey)
        }
        try folder.write(Array(granted.certificate.utf8), to: folder.certificate, mode: 0o644)
        return (granted.host, newKeyID)
    }

    private static func tlsKey(_ file: String) throws -> Certificate.PrivateKey {
        let text = String(decoding: try Files.readSecret(file), as: UTF8.self)
        do { return try Certificate.PrivateKey(pemEncoded: text) } catch {
            throw MigrationError(
                .invalidArgument, "\(file) holds no private key in PEM", hint: "move it away, then ask for a new one")
        }
    }

    /// What a file holds that was taken for another, as far as that can be told.
    private static func found(in bytes: [UInt8]) -> String {
        let data = Data(bytes)
        if (try? JSONDecoder().decode(Request.self, from: data)) != nil { return ", but a request" }
        if (try? JSONDecoder().decode(Answer.self, from: data)) != nil {
            return ", but an answer, which the host takes"
        }
        if data.isEmpty { return ": it is empty" }
        let label = String(decoding: bytes, as: UTF8.self).firstMatch(of: #/-----BEGIN ([A-Z0-9 ]+)-----/#)?.1
        return label.map { ", but PEM: \($0)" } ?? ""
    }

    private static func json(_ value: some Encodable) throws -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        return Array(try encoder.encode(value)) + [10]
    }
}
