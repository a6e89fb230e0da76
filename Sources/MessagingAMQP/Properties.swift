import CRabbitMQ
import Messaging
import MigrationModel

/// The properties of a message as it came, with what belongs to the bus alone taken out of its headers.
struct Properties {
    /// Names a publish to its publisher when the broker returns the message. Taken out again on delivery; no signature
    /// covers headers in `x-`.
    static let publishTag = "x-publish-tag"
    /// How often a quorum queue has delivered the message before.
    static let deliveryCount = "x-delivery-count"
    /// A list with a table for each queue and reason it died of: https://www.rabbitmq.com/docs/dlx#effects
    static let deaths = "x-death"

    var type = ""
    var contentType = ""
    var correlationID = ""
    var messageID = ""
    var userID = ""
    var sentAt: Moment?
    var headers: [String: HeaderValue] = [:]
    var publishTag: UInt64?
    var deliveryCount: Int?
    /// When it was dead-lettered for the first time, in whole seconds.
    var firstDeath: Moment?

    init() {}

    init(_ properties: amqp_basic_properties_t) {
        func text(_ flag: Int32, _ bytes: amqp_bytes_t) -> String {
            properties._flags & UInt32(bitPattern: flag) == 0 ? "" : bytes.text
        }
        type = text(AMQP_BASIC_TYPE_FLAG, properties.type)
        contentType = text(AMQP_BASIC_CONTENT_TYPE_FLAG, properties.content_type)
        correlationID = text(AMQP_BASIC_CORRELATION_ID_FLAG, properties.correlation_id)
        messageID = text(AMQP_BASIC_MESSAGE_ID_FLAG, properties.message_id)
        userID = text(AMQP_BASIC_USER_ID_FLAG, properties.user_id)
        if properties._flags & UInt32(AMQP_BASIC_TIMESTAMP_FLAG) != 0 {
            let (milliseconds, overflow) = Int64(clamping: properties.timestamp).multipliedReportingOverflow(by: 1000)
            if !overflow { sentAt = Moment(milliseconds: milliseconds) }
        }
        guard properties._flags & UInt32(AMQP_BASIC_HEADERS_FLAG) != 0 else { return }
        for entry in UnsafeBufferPointer(
            start: properties.headers.entries, count: Int(properties.headers.num_entries))
        {
            if entry.key.text == Self.deaths { firstDeath = Moment(firstOf: entry.value) }
            guard let value = HeaderValue(entry.value) else { continue }
            switch entry.key.text {
            case Self.publishTag: publishTag = value.integer.flatMap(UInt64.init(exactly:))
            case Self.deliveryCount: deliveryCount = value.integer.flatMap(Int.init(exactly:))
            case let key: headers[key] = value
            }
        }
    }
}

extension Moment {
    /// The earliest `time` of a list of deaths.
    fileprivate init?(firstOf deaths: amqp_field_value_t) {
        guard UInt32(deaths.kind) == AMQP_FIELD_KIND_ARRAY.rawValue else { return nil }
        let list = deaths.value.array
        var first: Int64?
        for death in UnsafeBufferPointer(start: list.entries, count: Int(list.num_entries))
        where UInt32(death.kind) == AMQP_FIELD_KIND_TABLE.rawValue {
            let table = death.value.table
            for entry in UnsafeBufferPointer(start: table.entries, count: Int(table.num_entries))
            where entry.key.text == "time" {
                guard let seconds = HeaderValue(entry.value)?.integer else { continue }
                first = min(first ?? seconds, seconds)
            }
        }
        guard let (milliseconds, overflow) = first?.multipliedReportingOverflow(by: 1000), !overflow else { return nil }
        self.init(milliseconds: milliseconds)
    }
}

extension HeaderValue {
    /// Whole numbers, text and bytes as they are, other scalars as text; nil for tables, lists and nothing.
    init?(_ field: amqp_field_value_t) {
        let value = field.value
        switch UInt32(field.kind) {
        case AMQP_FIELD_KIND_UTF8.rawValue: self = value.bytes.validText.map(Self.string) ?? .bytes(value.bytes.array)
        case AMQP_FIELD_KIND_BYTES.rawValue: self = .bytes(value.bytes.array)
        case AMQP_FIELD_KIND_I8.rawValue: self = .integer(Int64(value.i8))
        case AMQP_FIELD_KIND_U8.rawValue: self = .integer(Int64(value.u8))
        case AMQP_FIELD_KIND_I16.rawValue: self = .integer(Int64(value.i16))
        case AMQP_FIELD_KIND_U16.rawValue: self = .integer(Int64(value.u16))
        case AMQP_FIELD_KIND_I32.rawValue: self = .integer(Int64(value.i32))
        case AMQP_FIELD_KIND_U32.rawValue: self = .integer(Int64(value.u32))
        case AMQP_FIELD_KIND_I64.rawValue: self = .integer(value.i64)
        case AMQP_FIELD_KIND_U64.rawValue, AMQP_FIELD_KIND_TIMESTAMP.rawValue:
            self = Int64(exactly: value.u64).map(Self.integer) ?? .string("\(value.u64)")
        case AMQP_FIELD_KIND_BOOLEAN.rawValue: self = .string(value.boolean != 0 ? "true" : "false")
        case AMQP_FIELD_KIND_F32.rawValue: self = .string("\(value.f32)")
        case AMQP_FIELD_KIND_F64.rawValue: self = .string("\(value.f64)")
        default: return nil
        }
    }
}

/// Turns a message into the library's structures. Their memory is the encoder's own, good until `reset`.
final class PropertyEncoder {
    private let pool: UnsafeMutablePointer<amqp_pool_t>

    init() {
        pool = .allocate(capacity: 1)
        init_amqp_pool(pool, 8192)
    }

    deinit {
        empty_amqp_pool(pool)
        pool.deallocate()
    }

    func reset() { recycle_amqp_pool(pool) }

    func bytes(_ text: String) -> amqp_bytes_t {
        var text = text
        return text.withUTF8 { copy(UnsafeRawBufferPointer($0)) }
    }

    private func copy(_ source: UnsafeRawBufferPointer) -> amqp_bytes_t {
        guard let base = source.baseAddress, !source.isEmpty, let memory = amqp_pool_alloc(pool, source.count) else {
            return amqp_empty_bytes
        }
        memory.copyMemory(from: base, byteCount: source.count)
        return amqp_bytes_t(len: source.count, bytes: memory)
    }

    func table(_ entries: [(String, HeaderValue)]) -> amqp_table_t { table(entries.map { ($0.0, field($0.1)) }) }

    private func field(_ value: HeaderValue) -> amqp_field_value_t {
        var field = amqp_field_value_t()
        switch value {
        case .string(let text):
            field.kind = UInt8(AMQP_FIELD_KIND_UTF8.rawValue)
            field.value.bytes = bytes(text)
        case .integer(let number):
            field.kind = UInt8(AMQP_FIELD_KIND_I64.rawValue)
            field.value.i64 = number
        case .bytes(let array):
            field.kind = UInt8(AMQP_FIELD_KIND_BYTES.rawValue)
            field.value.bytes = array.withUnsafeBytes(copy)
        }
        return field
    }

    private func table(_ entries: [(String, amqp_field_value_t)]) -> amqp_table_t {
        let size = MemoryLayout<amqp_table_entry_t>.stride * entries.count
        guard size > 0, let memory = amqp_pool_alloc(pool, size) else { return amqp_empty_table }
        let fields = memory.bindMemory(to: amqp_table_entry_t.self, capacity: entries.count)
        for (index, (key, value)) in entries.enumerated() {
            (fields + index).initialize(to: amqp_table_entry_t(key: bytes(key), value: value))
        }
        return amqp_table_t(num_entries: Int32(entries.count), entries: fields)
    }

    /// What a client tells the broker of itself: its name, and which of the broker's extensions it understands
    /// (https://www.rabbitmq.com/docs/connections#capabilities). The library adds what it does itself.
    func clientProperties(name: String) -> amqp_table_t {
        var yes = amqp_field_value_t()
        yes.kind = UInt8(AMQP_FIELD_KIND_BOOLEAN.rawValue)
        yes.value.boolean = 1
        let understood = ["basic.nack", "connection.blocked", "consumer_cancel_notify", "publisher_confirms"]
        var capabilities = amqp_field_value_t()
        capabilities.kind = UInt8(AMQP_FIELD_KIND_TABLE.rawValue)
        capabilities.value.table = table(understood.map { ($0, yes) })
        return table([
            ("product", field(.string("Flotilla"))), ("connection_name", field(.string(name))),
            ("capabilities", capabilities),
        ])
    }

    /// Persistent, with a timestamp of now.
    func properties(of message: Message, tag: UInt64, now: Moment) -> amqp_basic_properties_t {
        var properties = amqp_basic_properties_t()
        var flags = AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_TIMESTAMP_FLAG | AMQP_BASIC_HEADERS_FLAG
        properties.delivery_mode = UInt8(AMQP_DELIVERY_PERSISTENT.rawValue)
        properties.timestamp = UInt64(now.milliseconds / 1000)
        properties.headers = table(
            message.headers.map { ($0.key, $0.value) } + [(Properties.publishTag, .integer(Int64(tag)))])
        func set(_ field: inout amqp_bytes_t, _ text: String, _ flag: Int32) {
            guard !text.isEmpty else { return }
            flags |= flag
            field = bytes(text)
        }
        set(&properties.type, message.type, AMQP_BASIC_TYPE_FLAG)
        set(&properties.content_type, message.contentType, AMQP_BASIC_CONTENT_TYPE_FLAG)
        set(&properties.correlation_id, message.correlationID, AMQP_BASIC_CORRELATION_ID_FLAG)
        set(&properties.message_id, message.messageID, AMQP_BASIC_MESSAGE_ID_FLAG)
        set(&properties.user_id, message.userID, AMQP_BASIC_USER_ID_FLAG)
        properties._flags = UInt32(flags)
        return properties
    }
}

extension Message {
    /// Of the encoded headers; they must fit one frame, whose default limit is 128 KiB, with what dead-lettering adds.
    static let maximumHeaders = 64 << 10

    /// Throws `resourceExhausted` or `invalidArgument` for what can't be sent. The library would find out after it has
    /// sent half of the message.
    func validateForAMQP() throws {
        guard body.count <= Message.maximumBody else {
            throw MigrationError(
                .resourceExhausted,
                "message \(type) for \(correlationID) has \(body.count) bytes, \(Message.maximumBody) are allowed")
        }
        let names = [
            ("exchange", exchange), ("routing key", routingKey), ("type", type), ("content-type", contentType),
            ("correlation-id", correlationID),
            ("message-id", messageID), ("user-id", userID),
        ]
        for (name, text) in names where text.utf8.count > 255 {
            throw MigrationError(
                .invalidArgument, "\(name) '\(text.prefix(40))…' has \(text.utf8.count) bytes, AMQP allows 255")
        }
        var size = 0
        for (key, value) in headers {
            guard key.utf8.count <= 128 else {
                throw MigrationError(
                    .invalidArgument,
                    "header '\(key.prefix(40))…' has a name of \(key.utf8.count) bytes, 128 are allowed")
            }
            switch value {
            case .string(let text): size += text.utf8.count
            case .integer: size += 8
            case .bytes(let bytes): size += bytes.count
            }
            size += key.utf8.count + 6
        }
        guard size <= Message.maximumHeaders else {
            throw MigrationError(
                .invalidArgument,
                "the headers of message \(type) for \(correlationID) have \(size) bytes, \(Message.maximumHeaders) are allowed"
            )
        }
    }
}
