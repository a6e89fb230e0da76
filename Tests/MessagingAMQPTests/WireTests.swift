import CRabbitMQ
import HostKit
import Messaging
import MigrationModel
import TestKit
import Testing

@testable import MessagingAMQP

/// The parts that need no broker.
@Suite struct WireTests {
    @Test func confirmsComeInAnyOrderAndInBulk() {
        var window = ConfirmWindow<String>()
        for name in ["a", "b", "c", "d", "e"] { window.append(name, size: 10) }
        #expect(window.nextTag == 6)
        #expect(window.confirm(2, isMultiple: false).map(\.entry) == ["b"])
        #expect(window.confirm(2, isMultiple: false).isEmpty)
        #expect(window.confirm(3, isMultiple: true).map(\.entry) == ["a", "c"])
        #expect(window.oldest == "d")
        #expect(window.count == 2 && window.size == 20)
        #expect(window.confirm(2, isMultiple: true).isEmpty)
        window.markReturned(5, "no route")
        window.markReturned(1, "settled already")
        window.markReturned(99, "never sent")
        let rest = window.confirm(0, isMultiple: true)
        #expect(rest.map(\.entry) == ["d", "e"] && rest.map(\.returned) == [nil, "no route"])
        #expect(window.count == 0 && window.size == 0 && window.oldest == nil)
        #expect(window.confirm(6, isMultiple: false).isEmpty)
        #expect(window.confirm(.max, isMultiple: true).isEmpty)
        #expect(window.confirm(0, isMultiple: true).isEmpty)
    }

    @Test func abandonedPublishesAreNotConfirmedLater() {
        var window = ConfirmWindow<Int>()
        for number in 1...3 { window.append(number, size: 1) }
        #expect(window.removeOldest { $0 > 1 } == nil)
        #expect(window.removeOldest { $0 == 1 } == 1)
        #expect(window.abandoned == 1 && window.count == 2)
        #expect(window.confirm(2, isMultiple: true).map(\.entry) == [2])
        #expect(window.removeAll() == [3])
        #expect(window.nextTag == 1 && window.abandoned == 0)
    }

    @Test func windowStaysSmallOverManyTags() {
        var window = ConfirmWindow<UInt64>()
        for tag in UInt64(1)...10_000 {
            window.append(tag, size: 1)
            if tag > 100 { #expect(window.confirm(tag - 100, isMultiple: false).map(\.entry) == [tag - 100]) }
        }
        #expect(window.count == 100 && window.oldest == 9901)
    }

    @Test(
        arguments: [
            (nil, false, 0), (nil, true, 1), (0, true, 1), (2, true, 2), (1, false, 1),
        ] as [(Int?, Bool, Int)])
    func redeliveryIsKnownByCountOrFlag(_ count: Int?, _ flag: Bool, _ expected: Int) {
        var properties = Properties()
        properties.deliveryCount = count
        let content = ContentAssembly.Content(
            method: .deliver(tag: 1, isRedelivered: flag, exchange: "e", routingKey: "k"), properties: properties,
            body: [], size: 0)
        #expect(content.redeliveries == expected)
    }

    @Test func contentIsPutTogetherAndBounded() {
        let deliver = Frame.Method.deliver(tag: 1, isRedelivered: false, exchange: "e", routingKey: "k")
        var assembly = ContentAssembly(deliver)
        #expect(assembly.add(.header(channel: 1, bodySize: 3, Properties())) == nil)
        #expect(assembly.add(.body(channel: 1, [1, 2])) == nil)
        #expect(assembly.add(.body(channel: 1, [3]))?.body == [1, 2, 3])
        // Nothing more belongs to it.
        #expect(assembly.add(.body(channel: 1, [4])) == nil)

        assembly = ContentAssembly(deliver)
        #expect(assembly.add(.header(channel: 1, bodySize: 0, Properties()))?.body == [])

        assembly = ContentAssembly(deliver)
        let size = UInt64(Message.maximumBody) + 1
        #expect(assembly.add(.header(channel: 1, bodySize: size, Properties())) == nil)
        #expect(assembly.add(.body(channel: 1, [UInt8](repeating: 0, count: Message.maximumBody))) == nil)
        let oversized = assembly.add(.body(channel: 1, [0]))
        #expect(oversized?.size == size && oversized?.body == [])
    }

    @Test func backoffGrowsToItsLimitWithJitter() {
        let backoff = Backoff(base: .milliseconds(100), limit: .seconds(5))
        #expect((1...8).map { backoff.bound(after: $0).milliseconds } == [100, 200, 400, 800, 1600, 3200, 5000, 5000])
        #expect(backoff.bound(after: 1000) == .seconds(5))
        for attempt in 1...20 {
            let delay = backoff.delay(after: attempt)
            #expect(delay >= .zero && delay <= backoff.bound(after: attempt))
        }
        #expect(Set((0..<20).map { _ in backoff.delay(after: 9) }).count > 10)
    }

    /// Whatever somebody else's client puts into headers is read, kept as text or left out.
    @Test func foreignHeadersAreHarmless() {
        var bytes: [UInt8] = [0xff, 0xfe]
        bytes.withUnsafeMutableBytes { raw in
            func field(_ kind: amqp_field_value_kind_t, _ set: (inout amqp_field_value_t) -> Void) -> amqp_field_value_t
            {
                var value = amqp_field_value_t()
                value.kind = UInt8(kind.rawValue)
                set(&value)
                return value
            }
            let data = amqp_bytes_t(len: raw.count, bytes: raw.baseAddress)
            let fields: [(String, amqp_field_value_t)] = [
                ("invalid utf-8", field(AMQP_FIELD_KIND_UTF8) { $0.value.bytes = data }),
                ("boolean", field(AMQP_FIELD_KIND_BOOLEAN) { $0.value.boolean = 1 }),
                ("i8", field(AMQP_FIELD_KIND_I8) { $0.value.i8 = -1 }),
                ("u32", field(AMQP_FIELD_KIND_U32) { $0.value.u32 = .max }),
                ("u64", field(AMQP_FIELD_KIND_U64) { $0.value.u64 = .max }),
                ("f64", field(AMQP_FIELD_KIND_F64) { $0.value.f64 = 1.5 }),
                ("decimal", field(AMQP_FIELD_KIND_DECIMAL) { $0.value.decimal.value = 1 }),
                ("void", field(AMQP_FIELD_KIND_VOID) { _ in }),
                ("table", field(AMQP_FIELD_KIND_TABLE) { $0.value.table = amqp_empty_table }),
                ("array", field(AMQP_FIELD_KIND_ARRAY) { $0.value.array = amqp_empty_array }),
                (Properties.deliveryCount, field(AMQP_FIELD_KIND_I64) { $0.value.i64 = .min }),
                (Properties.publishTag, field(AMQP_FIELD_KIND_I64) { $0.value.i64 = -5 }),
            ]
            let encoder = PropertyEncoder()
            var entries = fields.map { amqp_table_entry_t(key: encoder.bytes($0.0), value: $0.1) }
            entries.withUnsafeMutableBufferPointer { buffer in
                var raw = amqp_basic_properties_t()
                raw.headers = amqp_table_t(num_entries: Int32(buffer.count), entries: buffer.baseAddress)
                raw.timestamp = .max
                raw._flags = UInt32(AMQP_BASIC_HEADERS_FLAG | AMQP_BASIC_TIMESTAMP_FLAG)
                let properties = Properties(raw)
                #expect(
                    properties.headers == [
                        "invalid utf-8": .bytes([0xff, 0xfe]), "boolean": .string("true"), "i8": .integer(-1),
                        "u32": .integer(Int64(UInt32.max)), "u64": .string("\(UInt64.max)"), "f64": .string("1.5"),
                    ])
                #expect(properties.sentAt == nil && properties.publishTag == nil)
                #expect(properties.deliveryCount == .min)
            }
        }
    }

    @Test func whatAMQPCannotCarryIsRefusedBeforeItIsSent() {
        func refusal(_ change: (inout Message) -> Void) -> MigrationError.Code? {
            var message = Message(exchange: "e", routingKey: "k", body: [])
            change(&message)
            return failure { try message.validateForAMQP() }?.code
        }
        #expect(refusal { _ in } == nil)
        #expect(refusal { $0.routingKey = String(repeating: "ü", count: 128) } == .invalidArgument)
        #expect(refusal { $0.correlationID = String(repeating: "x", count: 255) } == nil)
        #expect(refusal { $0.headers[String(repeating: "x", count: 129)] = .integer(1) } == .invalidArgument)
        #expect(refusal { $0.headers["x"] = .bytes([UInt8](repeating: 0, count: 65 << 10)) } == .invalidArgument)
        #expect(refusal { $0.body = [UInt8](repeating: 0, count: Message.maximumBody + 1) } == .resourceExhausted)
    }
}

extension RabbitMQ {
    /// Messages of clients that keep to no rule of ours.
    @Suite struct Foreign {}
}

extension RabbitMQ.Foreign {
    /// Publishes without the bus's own checks.
    private func publish(_ message: Message, _ configuration: AMQPConfiguration) async throws {
        try await blocking("foreign") {
            let connection = try Connection(to: configuration.brokers[0], configuration, name: "foreign")
            _ = try connection.request { handle, _ in amqp_channel_open(handle, 1) }
            try connection.publish(message, tag: 1, channel: 1)
            connection.close()
        }
    }

    /// A reader learns of it, without it, and can have it kept: among dead letters as elsewhere.
    @Test func oversizedBodiesAreLeftOut() async throws {
        let names = Broker.names()
        let configuration = try Broker.current.configuration()
        try await withBus(configuration) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var message = Message(exchange: names.tasks, routingKey: "kvm1", body: [])
            message.body = [UInt8](repeating: 7, count: 5 * Message.maximumBody)
            try await publish(message, configuration)
            message.body = [1]
            message.headers[Message.omittedBodySize] = .integer(7)
            try await publish(message, configuration)
            var iterator = subscription.deliveries.makeAsyncIterator()
            let large = try await iterator.delivery()
            #expect(large.message.body == [] && large.message.bodySize == 5 << 20)
            #expect(failure { try large.message.requireSize() }?.code == .invalidArgument)
            await large.settle(.reject(reason: "too large"))
            // Nobody else says how large a message is.
            let small = try await iterator.delivery()
            #expect(small.message.body == [1] && small.message.bodySize == 1)
            await small.settle(.ack)
            for _ in 1...2 {
                let dead = try await bus.subscribe(names.dead, prefetch: 1)
                var letters = dead.deliveries.makeAsyncIterator()
                let letter = try await letters.delivery()
                #expect(letter.message.body == [] && letter.message.bodySize == 5 << 20)
                dead.cancel()
            }
            let letters = try await eventually {
                let letters = try await bus.peek(names.dead, limit: 2)
                return letters.isEmpty ? nil : letters
            }
            #expect(letters?.map(\.bodySize) == [5 << 20])
        }
    }

    /// A header table that fills its frame grows by dead-lettering, beyond the frame size agreed on.
    @Test func oversizedHeadersEndNoConnection() async throws {
        let names = Broker.names()
        let configuration = try Broker.current.configuration()
        try await withBus(configuration) { bus in
            try await bus.declare(names.topology(hosts: ["kvm1"]))
            var message = Message(exchange: names.tasks, routingKey: "kvm1", body: [1])
            // 131072 less the frame's own 8 bytes, and some 70 of properties and the names.
            message.headers["big"] = .bytes([UInt8](repeating: 0, count: 131_072 - 90))
            try await publish(message, configuration)
            let subscription = try await bus.subscribe(names.tasks(of: "kvm1"), prefetch: 1)
            var iterator = subscription.deliveries.makeAsyncIterator()
            let delivery = try await iterator.delivery()
            #expect(delivery.redeliveries == 0)
            await delivery.settle(.reject(reason: "too much"))
            let dead = try await bus.subscribe(names.dead, prefetch: 1)
            var letters = dead.deliveries.makeAsyncIterator()
            let letter = try await letters.delivery()
            #expect(letter.redeliveries == 0)
            #expect(letter.message.headers["big"] == message.headers["big"])
            await letter.settle(.requeue)
            dead.cancel()
            let seen = try await eventually { try await bus.peek(names.dead, limit: 1).first }
            #expect(seen?.headers["big"] == message.headers["big"])
        }
    }
}
