import CRabbitMQ
import MigrationModel

/// A frame from the broker, copied out of the library's memory. Only methods that this project's requests can cause
/// have a case.
enum Frame {
    case method(channel: UInt16, Method)
    case header(channel: UInt16, bodySize: UInt64, Properties)
    case body(channel: UInt16, [UInt8])

    enum Method {
        case connectionClose(code: UInt16, text: String)
        case connectionBlocked(reason: String)
        case connectionUnblocked
        case channelOpened
        case channelClose(code: UInt16, text: String)
        case channelClosed
        case confirming
        case prefetchSet
        case consuming
        case consumerCancelled
        case deliver(tag: UInt64, isRedelivered: Bool, exchange: String, routingKey: String)
        case got(tag: UInt64, isRedelivered: Bool, exchange: String, routingKey: String)
        case gotNothing
        case returned(code: UInt16, text: String)
        case confirmed(tag: UInt64, isMultiple: Bool)
        case refused(tag: UInt64, isMultiple: Bool)
        case other(UInt32)
    }

    init(_ frame: borrowing amqp_frame_t) {
        let channel = frame.channel
        switch Int32(frame.frame_type) {
        case AMQP_FRAME_HEADER:
            let header = frame.payload.properties
            let decoded = header.decoded?.assumingMemoryBound(to: amqp_basic_properties_t.self).pointee
            self = .header(
                channel: channel, bodySize: header.body_size,
                decoded.map(Properties.init) ?? Properties())
        case AMQP_FRAME_BODY: self = .body(channel: channel, frame.payload.body_fragment.array)
        default: self = .method(channel: channel, Method(frame.payload.method))
        }
    }
}

extension Frame.Method {
    init(_ method: amqp_method_t) {
        func decoded<Value>(_ type: Value.Type) -> Value? {
            method.decoded?.assumingMemoryBound(to: Value.self).pointee
        }
        self = .other(method.id)
        switch method.id {
        case AMQP_CONNECTION_CLOSE_METHOD:
            if let it = decoded(amqp_connection_close_t.self) {
                self = .connectionClose(code: it.reply_code, text: it.reply_text.text)
            }
        case AMQP_CONNECTION_BLOCKED_METHOD:
            if let it = decoded(amqp_connection_blocked_t.self) { self = .connectionBlocked(reason: it.reason.text) }
        case AMQP_CONNECTION_UNBLOCKED_METHOD: self = .connectionUnblocked
        case AMQP_CHANNEL_OPEN_OK_METHOD: self = .channelOpened
        case AMQP_CHANNEL_CLOSE_METHOD:
            if let it = decoded(amqp_channel_close_t.self) {
                self = .channelClose(code: it.reply_code, text: it.reply_text.text)
            }
        case AMQP_CHANNEL_CLOSE_OK_METHOD: self = .channelClosed
        case AMQP_CONFIRM_SELECT_OK_METHOD: self = .confirming
        case AMQP_BASIC_QOS_OK_METHOD: self = .prefetchSet
        case AMQP_BASIC_CONSUME_OK_METHOD: self = .consuming
        case AMQP_BASIC_CANCEL_METHOD: self = .consumerCancelled
        case AMQP_BASIC_DELIVER_METHOD:
            if let it = decoded(amqp_basic_deliver_t.self) {
                self = .deliver(
                    tag: it.delivery_tag, isRedelivered: it.redelivered != 0, exchange: it.exchange.text,
                    routingKey: it.routing_key.text)
            }
        case AMQP_BASIC_GET_OK_METHOD:
            if let it = decoded(amqp_basic_get_ok_t.self) {
                self = .got(
                    tag: it.delivery_tag, isRedelivered: it.redelivered != 0, exchange: it.exchange.text,
                    routingKey: it.routing_key.text)
            }
        case AMQP_BASIC_GET_EMPTY_METHOD: self = .gotNothing
        case AMQP_BASIC_RETURN_METHOD:
            if let it = decoded(amqp_basic_return_t.self) {
                self = .returned(code: it.reply_code, text: it.reply_text.text)
            }
        case AMQP_BASIC_ACK_METHOD:
            if let it = decoded(amqp_basic_ack_t.self) {
                self = .confirmed(tag: it.delivery_tag, isMultiple: it.multiple != 0)
            }
        case AMQP_BASIC_NACK_METHOD:
            if let it = decoded(amqp_basic_nack_t.self) {
                self = .refused(tag: it.delivery_tag, isMultiple: it.multiple != 0)
            }
        default: break
        }
    }
}

extension amqp_bytes_t {
    private var buffer: UnsafeRawBufferPointer { UnsafeRawBufferPointer(start: bytes, count: bytes == nil ? 0 : len) }

    var array: [UInt8] { Array(buffer) }

    /// Bytes that are no UTF-8 become replacement characters.
    var text: String { String(decoding: buffer, as: UTF8.self) }

    var validText: String? { String(validating: buffer, as: UTF8.self) }
}
