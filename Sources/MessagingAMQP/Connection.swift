import CRabbitMQ
import Glibc
import HostKit
import Messaging
import MigrationModel
import Synchronization

/// One connection to one broker. Owns the library's handle and frees it at its end. Belongs to the thread that made it:
/// the library serves heartbeats only inside its calls, and none of them may run at the same time as another.
final class Connection {
    let broker: AMQPConfiguration.Broker
    /// Of both directions; zero when the broker wants none.
    let heartbeat: Duration
    /// Why the broker takes no messages now.
    var blocked: String?
    private let handle: amqp_connection_state_t
    private let encoder = PropertyEncoder()

    /// Connects, verifies and logs in, within about three times the configuration's request timeout and what the
    /// resolver takes.
    init(to broker: AMQPConfiguration.Broker, _ configuration: AMQPConfiguration, name: String) throws {
        guard let handle = amqp_new_connection() else {
            throw MigrationError(.resourceExhausted, "no memory for a connection to broker \(broker)")
        }
        do {
            try Self.open(handle, broker, configuration, name: name)
        } catch {
            amqp_destroy_connection(handle)
            throw error
        }
        self.handle = handle
        self.broker = broker
        heartbeat = .seconds(Int64(amqp_get_heartbeat(handle)))
    }

    deinit { amqp_destroy_connection(handle) }

    var descriptor: Int32 { amqp_get_sockfd(handle) }

    /// Frames that poll(2) can't know of.
    var hasBuffered: Bool { amqp_frames_enqueued(handle) != 0 || amqp_data_in_buffer(handle) != 0 }

    /// The next frame, or nil when there is none within the time. Sends and expects heartbeats.
    func receive(within time: Duration = .zero) throws -> Frame? {
        var frame = amqp_frame_t()
        var time = timeval(time)
        let status = amqp_simple_wait_frame_noblock(handle, &frame, &time)
        guard status != AMQP_STATUS_TIMEOUT.rawValue else { return nil }
        try check(status)
        defer { amqp_maybe_release_buffers_on_channel(handle, frame.channel) }
        return Frame(frame)
    }

    /// Sends a method without content. Blocks while the broker does not read, at most until TCP gives up.
    func send<Method: BitwiseCopyable>(_ id: UInt32, _ method: Method, channel: UInt16) throws {
        var method = method
        try check(withUnsafeMutableBytes(of: &method) { amqp_send_method(handle, channel, id, $0.baseAddress) })
    }

    func openChannel(_ channel: UInt16) throws {
        try send(AMQP_CHANNEL_OPEN_METHOD, amqp_channel_open_t(out_of_band: amqp_empty_bytes), channel: channel)
    }

    func closeChannel(_ channel: UInt16) throws {
        try send(
            AMQP_CHANNEL_CLOSE_METHOD,
            amqp_channel_close_t(
                reply_code: UInt16(AMQP_REPLY_SUCCESS), reply_text: amqp_empty_bytes, class_id: 0, method_id: 0),
            channel: channel)
    }

    /// Answers the broker's `channel.close`; the number can be used again.
    func confirmChannelClose(_ channel: UInt16) throws {
        try send(AMQP_CHANNEL_CLOSE_OK_METHOD, amqp_channel_close_ok_t(dummy: 0), channel: channel)
    }

    func setPrefetch(_ count: Int, channel: UInt16) throws {
        try send(
            AMQP_BASIC_QOS_METHOD,
            amqp_basic_qos_t(prefetch_size: 0, prefetch_count: UInt16(clamping: max(count, 1)), global: 0),
            channel: channel)
    }

    func consume(_ queue: String, channel: UInt16) throws {
        defer { encoder.reset() }
        try send(
            AMQP_BASIC_CONSUME_METHOD,
            amqp_basic_consume_t(
                ticket: 0, queue: encoder.bytes(queue), consumer_tag: amqp_empty_bytes, no_local: 0, no_ack: 0,
                exclusive: 0, nowait: 0, arguments: amqp_empty_table),
            channel: channel)
    }

    func get(_ queue: String, channel: UInt16) throws {
        defer { encoder.reset() }
        try send(
            AMQP_BASIC_GET_METHOD, amqp_basic_get_t(ticket: 0, queue: encoder.bytes(queue), no_ack: 0),
            channel: channel)
    }

    /// - Parameter isMultiple: also everything before that is not settled yet.
    func acknowledge(_ tag: UInt64, isMultiple: Bool, channel: UInt16) throws {
        try check(amqp_basic_ack(handle, channel, tag, isMultiple ? 1 : 0))
    }

    func reject(_ tag: UInt64, requeue: Bool, channel: UInt16) throws {
        try check(amqp_basic_reject(handle, channel, tag, requeue ? 1 : 0))
    }

    /// - Parameter tag: of the channel's confirm window.
    func publish(_ message: Message, tag: UInt64, channel: UInt16) throws {
        defer { encoder.reset() }
        var properties = encoder.properties(of: message, tag: tag, now: .now)
        let (exchange, key) = (encoder.bytes(message.exchange), encoder.bytes(message.routingKey))
        let status = message.body.withUnsafeBytes { body in
            amqp_basic_publish(
                handle, channel, exchange, key, 1, 0, &properties,
                amqp_bytes_t(len: body.count, bytes: UnsafeMutableRawPointer(mutating: body.baseAddress)))
        }
        try check(status)
    }

    /// What `body` sends goes out in full segments: the broker is woken once for many frames.
    func together(_ body: () throws -> Void) throws {
        cork(true)
        defer { cork(false) }
        try body()
    }

    /// Does nothing where there is no TCP; then frames go out one by one.
    private func cork(_ isOn: Bool) {
        var value: Int32 = isOn ? 1 : 0
        setsockopt(descriptor, Int32(IPPROTO_TCP), TCP_CORK, &value, socklen_t(MemoryLayout<Int32>.size))
    }

    /// Lets frames of up to `bytes` in. For connections that publish nothing: what a broker adds to the headers of a
    /// dead letter can exceed the frame size that was agreed on, and must not end every connection that reads it.
    func acceptFrames(of bytes: Int) throws {
        let heartbeat = amqp_get_heartbeat(handle)
        try check(amqp_tune_connection(handle, amqp_get_channel_max(handle), Int32(bytes), heartbeat))
    }

    /// Says goodbye, for at most the request timeout.
    func close() { _ = amqp_connection_close(handle, AMQP_REPLY_SUCCESS) }

    /// Runs requests that wait for the broker's answer. Only for connections without consumers and confirms, whose
    /// frames would be lost.
    func request<Reply>(_ body: (amqp_connection_state_t, PropertyEncoder) -> UnsafeMutablePointer<Reply>?) throws
        -> Reply
    {
        defer { encoder.reset() }
        let reply = body(handle, encoder)
        guard let reply else {
            throw Self.failure(amqp_get_rpc_reply(handle), broker) ?? MigrationError(.internal, "no reply")
        }
        return reply.pointee
    }

    func check(_ status: Int32) throws {
        guard status != AMQP_STATUS_OK.rawValue else { return }
        throw Self.failure(status, broker)
    }
}

/// What the library takes for a time.
func timeval(_ duration: Duration) -> timeval {
    let (seconds, attoseconds) = duration.components
    return flotilla_timeval(Int(seconds), Int(attoseconds / 1_000_000_000_000))
}
