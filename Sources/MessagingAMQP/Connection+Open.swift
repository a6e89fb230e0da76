import CRabbitMQ
import Glibc
import HostKit
import MigrationModel

extension Connection {
    /// What a broker may ask for at most; the smaller of both counts. RabbitMQ's default is 128 KiB.
    private static let largestFrame: Int32 = 1 << 20

    static func open(
        _ handle: amqp_connection_state_t, _ broker: AMQPConfiguration.Broker, _ configuration: AMQPConfiguration,
        name: String
    ) throws {
        var timeout = timeval(configuration.requestTimeout)
        amqp_set_handshake_timeout(handle, &timeout)
        amqp_set_rpc_timeout(handle, &timeout)
        let socket = try socket(handle, configuration.tls)
        let status = amqp_socket_open_noblock(socket, broker.host, Int32(broker.port), &timeout)
        guard status == AMQP_STATUS_OK.rawValue else {
            let isUnreached = [AMQP_STATUS_SOCKET_ERROR, AMQP_STATUS_HOSTNAME_RESOLUTION_FAILED].contains {
                $0.rawValue == status
            }
            throw failure(status, broker, isUnreached ? obstacle(before: broker) : nil)
        }
        // A broker that does not read would otherwise stop the thread for good, heartbeats or not.
        let patience = UInt32(clamping: configuration.publishTimeout.milliseconds)
        guard flotilla_set_tcp_user_timeout(amqp_get_sockfd(handle), patience) == 0 else {
            throw systemError("set the timeout of the connection to", "broker \(broker)")
        }
        let reply = try login(handle, configuration, name: name)
        if let error = failure(reply, broker) { throw error }
    }

    /// A socket of the connection with what TLS needs, not connected.
    static func socket(_ handle: amqp_connection_state_t, _ tls: AMQPConfiguration.TLS?) throws -> OpaquePointer {
        // The connection owns its socket.
        let socket = tls == nil ? amqp_tcp_socket_new(handle) : amqp_ssl_socket_new(handle)
        guard let socket else {
            throw MigrationError(.resourceExhausted, "no memory for a connection to a broker")
        }
        guard let tls else { return socket }
        amqp_ssl_socket_set_verify_peer(socket, 1)
        amqp_ssl_socket_set_verify_hostname(socket, 1)
        guard amqp_ssl_socket_set_ssl_versions(socket, AMQP_TLSv1_2, AMQP_TLSvLATEST) == AMQP_STATUS_OK.rawValue else {
            throw MigrationError(.internal, "this OpenSSL has no TLS 1.2")
        }
        guard amqp_ssl_socket_set_cacert(socket, tls.authorities) == AMQP_STATUS_OK.rawValue else {
            throw MigrationError(
                .failedPrecondition, "\(tls.authorities) can't be read as PEM certificates of authorities")
        }
        if let certificate = tls.certificate, let key = tls.key {
            _ = try Files.readSecret(key)
            guard amqp_ssl_socket_set_key(socket, certificate, key) == AMQP_STATUS_OK.rawValue else {
                throw MigrationError(
                    .failedPrecondition, "\(certificate) and \(key) are not a PEM certificate and its key")
            }
        }
        return socket
    }

    private static func login(_ handle: amqp_connection_state_t, _ configuration: AMQPConfiguration, name: String)
        throws -> amqp_rpc_reply_t
    {
        let encoder = PropertyEncoder()
        var about = encoder.clientProperties(name: "\(configuration.connectionName) \(name)")
        let heartbeat = Int32(clamping: configuration.heartbeat.components.seconds)
        switch configuration.authentication {
        case .external:
            return flotilla_amqp_login_external(
                handle, configuration.virtualHost, largestFrame, heartbeat, &about)
        case .plain(let user, let file):
            return flotilla_amqp_login_plain(
                handle, configuration.virtualHost, largestFrame, heartbeat, &about, user,
                try AMQPConfiguration.password(file))
        }
    }

    // MARK: - Errors

    /// - Parameter reason: what the system said, if that is known. Else, of a connection that was there, its last error.
    static func failure(
        _ status: Int32, _ broker: AMQPConfiguration.Broker, _ reason: String? = nil
    ) -> MigrationError {
        let last = errno
        let isOfSystem = status == AMQP_STATUS_SOCKET_ERROR.rawValue && Self.networkErrors.contains(last)
        let text =
            reason ?? (isOfSystem ? String(cString: strerror(last)) : nil)
            ?? amqp_error_string2(status).map { String(cString: $0) } ?? "error \(status)"
        switch status {
        case AMQP_STATUS_SSL_HOSTNAME_VERIFY_FAILED.rawValue:
            return MigrationError(
                .unauthenticated, "the certificate of broker \(broker) is not for '\(broker.host)'",
                hint: "use a DNS name that the certificate lists")
        case AMQP_STATUS_SSL_PEER_VERIFY_FAILED.rawValue, AMQP_STATUS_SSL_CONNECTION_FAILED.rawValue:
            return MigrationError(
                .unauthenticated, "TLS with broker \(broker) failed: \(text)",
                hint: "check the configured authorities, and that the port speaks TLS")
        case AMQP_STATUS_HEARTBEAT_TIMEOUT.rawValue:
            return MigrationError(.unavailable, "broker \(broker) has been silent for two heartbeats")
        case AMQP_STATUS_TIMEOUT.rawValue:
            return MigrationError(.unavailable, "broker \(broker) did not answer in time")
        case AMQP_STATUS_SSL_ERROR.rawValue:
            return MigrationError(
                .unavailable, "TLS with broker \(broker) broke off: \(text)",
                hint: "if it refused this member's certificate, flotilla doctor tells whether that is still good, "
                    + "and the broker's log what it minds")
        case AMQP_STATUS_SOCKET_ERROR.rawValue, AMQP_STATUS_HOSTNAME_RESOLUTION_FAILED.rawValue:
            return MigrationError(
                .unavailable, "broker \(broker) can't be reached: \(text)",
                hint: "check that it runs, and its name and port in broker.addresses")
        default: return MigrationError(.unavailable, "broker \(broker): \(text)")
        }
    }

    /// Nil when there was none.
    static func failure(_ reply: amqp_rpc_reply_t, _ broker: AMQPConfiguration.Broker) -> MigrationError? {
        switch reply.reply_type {
        case AMQP_RESPONSE_NORMAL: return nil
        case AMQP_RESPONSE_LIBRARY_EXCEPTION: return failure(reply.library_error, broker)
        case AMQP_RESPONSE_SERVER_EXCEPTION:
            switch Frame.Method(reply.reply) {
            case .connectionClose(let code, let text), .channelClose(let code, let text):
                return refusal(code: code, text: text)
            default: return MigrationError(.internal, "broker \(broker) answered with method \(reply.reply.id)")
            }
        default: return MigrationError(.unavailable, "broker \(broker) closed the connection")
        }
    }

    /// The error for a reply code of AMQP 0-9-1, section 1.2 of its generated reference.
    static func refusal(code: UInt16, text: String) -> MigrationError {
        let kind: MigrationError.Code =
            switch code {
            case 403: text.contains("Login was refused") ? .unauthenticated : .permissionDenied
            case 404, 402: .notFound
            case 311: .resourceExhausted
            case 405, 406, 530: .failedPrecondition
            default: .unavailable
            }
        let hint: String? =
            switch (code, kind) {
            case (_, .unauthenticated): "check the user's name, and password or certificate: rabbitmqctl list_users"
            case (403, _), (530, _):
                "give members their permissions: flotilla fleet definitions | rabbitmqctl import_definitions"
            default: nil
            }
        return MigrationError(kind, "broker: \(text)", hint: hint)
    }
}
