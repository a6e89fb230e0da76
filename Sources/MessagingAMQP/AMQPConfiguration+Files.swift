import CRabbitMQ
import HostKit
import MigrationModel

extension AMQPConfiguration {
    /// Throws, with the setting and the file, for files with which no connection could ever be made: missing, unreadable, not
    /// PEM, a key of another certificate, no password. For the start of a service; later ones may be on their way.
    package func requireFiles() throws {
        if let tls {
            try requirePEM("tls.ca", tls.authorities)
            if let certificate = tls.certificate, let key = tls.key {
                try requirePEM("tls.certificate", certificate)
                try require("tls.key", hint: Self.enrollment) { _ = try Files.readSecret(key) }
            }
            guard let handle = amqp_new_connection() else {
                throw MigrationError(.resourceExhausted, "no memory for a connection to a broker")
            }
            defer { amqp_destroy_connection(handle) }
            // As every connection will.
            try require("tls", hint: Self.enrollment) { _ = try Connection.socket(handle, tls) }
        }
        if case .plain(let user, let file) = authentication {
            try require("password-file", hint: "write \(user)'s password into it, mode 600") {
                _ = try Self.password(file)
            }
        }
    }

    private static let enrollment =
        "flotilla fleet init, on a host flotilla worker enroll, makes ca.pem, tls.pem and tls.key; name those"

    private func requirePEM(_ setting: String, _ path: String) throws {
        try require(setting, hint: Self.enrollment) {
            let text = String(decoding: try Files.read(path, limit: 1 << 20), as: UTF8.self)
            guard text.contains("-----BEGIN CERTIFICATE-----") else {
                throw MigrationError(.failedPrecondition, "\(path) holds no certificate in PEM")
            }
        }
    }

    private func require(_ setting: String, hint: String, _ body: () throws -> Void) throws {
        do { try body() } catch let error as MigrationError {
            throw MigrationError(
                .failedPrecondition, "broker.\(setting): \(error.message)", hint: error.hint ?? hint, cause: error.cause
            )
        }
    }
}
