import FlotillaProtocol
import FoundationEssentials
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// The signed messages in `protocol/vectors`, which other languages test with: made from the contract by a program that
/// shares no code with this one.
@Suite struct VectorTests {
    private struct Key: Decodable {
        var seed: String
        var `public`: String
        var id: String
    }

    struct Vector: Decodable, Sendable, CustomTestStringConvertible {
        struct Header: Decodable, Sendable {
            var string: String?
            var integer: Int64?
            var bytes: String?
        }

        struct Envelope: Decodable, Sendable {
            var exchange: String
            var routingKey: String
            var type: String
            var contentType: String
            var correlationId: String
            var messageId: String
            var userId: String
            var headers: [String: Header]
            var body: String
        }

        var what: String
        var receiver: String
        var now: Int64
        var code: Int
        var message: Envelope
        var signed: String?

        var testDescription: String { what }
    }

    private static func read<Value: Decodable>(_ name: String) throws -> Value {
        var folder = #filePath
        for _ in 0..<3 { folder = String(folder[..<(try #require(folder.lastIndex(of: "/")))]) }
        let bytes = try Files.read("\(folder)/protocol/vectors/\(name).json", limit: 1 << 20)
        return try JSONDecoder().decode(Value.self, from: Data(bytes))
    }

    private static func signingKeys() throws -> [String: SigningKey] {
        try (read("keys") as [String: Key]).mapValues { try SigningKey(seed: bytes($0.seed)) }
    }

    private static func member(_ name: String) throws -> FleetMember {
        let keys = try signingKeys()
        let owners = name == FleetMember.coordinator ? ["kvm1", "kvm2"] : [FleetMember.coordinator]
        let believed = try owners.map { ($0, [try #require(keys[$0]).publicKey]) }
        return FleetMember(
            name: name, key: try #require(keys[name]), believes: KeyRing(Dictionary(uniqueKeysWithValues: believed)))
    }

    @Test func keys() throws {
        let texts: [String: Key] = try Self.read("keys")
        #expect(texts.count == 4)
        for (name, key) in try Self.signingKeys() {
            #expect(hex(key.publicKey.bytes) == texts[name]?.public)
            #expect(key.publicKey.id == texts[name]?.id)
        }
    }

    /// Signing what the vector holds, at the time it was signed, gives the vector byte by byte.
    @Test(arguments: ["task", "control", "events"])
    func goodMessages(_ file: String) throws {
        let vectors: [Vector] = try Self.read(file)
        #expect(!vectors.isEmpty)
        for vector in vectors {
            let message = try Messaging.Message(vector.message)
            #expect(hex(message.signedBytes) == vector.signed)
            let header = { (name: String) in try #require(message.headers[name]) }
            let issuer = try #require(try header("flotilla-issuer").string)
            let issued = try #require(try header("flotilla-issued-unix-ms").integer)
            let expires = try #require(try header("flotilla-expires-unix-ms").integer)
            #expect(
                try Self.member(vector.receiver).verify(message, now: Moment(milliseconds: vector.now)) == issuer)

            var own = message
            for name in message.headers.keys where name.hasPrefix("flotilla-") {
                if !["flotilla-attempt", "flotilla-fence"].contains(name) { own.headers[name] = nil }
            }
            try Self.member(issuer).sign(
                &own, for: vector.receiver, validity: .milliseconds(expires - issued),
                now: Moment(milliseconds: issued))
            #expect(own == message)
        }
    }

    /// Signing them together gives the vectors byte by byte.
    @Test func signedTogether() throws {
        let vectors: [Vector] = try Self.read("tasks")
        let messages = try vectors.map { try Messaging.Message($0.message) }
        #expect(messages.map { hex($0.signedBytes) } == vectors.map(\.signed))
        let now = Moment(milliseconds: try #require(vectors.first).now)
        for message in messages { #expect(try Self.member("kvm1").verify(message, now: now) == "coordinator") }
        var own = messages
        for index in own.indices { own[index].headers[Message.pathHeader] = nil }
        try Self.member("coordinator").sign(&own, for: "kvm1", validity: .seconds(24 * 3600), now: now)
        #expect(own == messages)
    }

    @Test func verdicts() throws {
        let vectors: [Vector] = try Self.read("verdicts")
        #expect(vectors.count > 20)
        for vector in vectors {
            let member = try Self.member(vector.receiver)
            let message = try Messaging.Message(vector.message)
            let error = failure { try member.verify(message, now: Moment(milliseconds: vector.now)) }
            #expect(
                (error?.code.rawValue ?? 0) == vector.code, "\(vector.what): \(error.map { "\($0)" } ?? "believed")")
        }
    }

    @Test func contents() throws {
        let task = try Messaging.Message((Self.read("task") as [Vector])[0].message)
        let call = try TaskCall(decoding: task, audience: "kvm1")
        #expect(call.identity == CallIdentity(task: task.correlationID, attempt: 2, fence: 2))
        #expect(call.method == "flotilla.v1.ConvertService/Convert")
        #expect(call.deadline == Moment(milliseconds: 1_767_398_400_000))
        #expect(call.traceparent?.hasPrefix("00-0b6f3f04") == true)
        let request = try ConvertRequest(serializedBytes: call.body)
        #expect(request.domainName == "web-1")
        #expect(request.manifest.vm.name == "web – 1")

        let control = try Messaging.Message((Self.read("control") as [Vector])[0].message)
        let orders = try ControlMessages(serializedBytes: control.body).messages
        #expect(orders.map(\.fence) == [2, 1, 7])
        #expect(orders[0].lease.ttlMs == 60_000)
        #expect(orders[1].cancel.revoked)

        let said = try Messaging.Message((Self.read("events") as [Vector])[0].message)
        let events = try WorkerEvents(serializedBytes: said.body)
        #expect(events.host == "kvm1")
        #expect(events.events.map(\.task.seq) == [1, 2, 3, 4, 0])
        #expect(events.events[3].task.ended.code == 9)
        #expect(events.events[4].heartbeat.tasks == 1)
    }
}

extension Messaging.Message {
    fileprivate init(_ vector: VectorTests.Vector.Envelope) throws {
        self.init(exchange: vector.exchange, routingKey: vector.routingKey, body: bytes(vector.body))
        (type, contentType) = (vector.type, vector.contentType)
        (correlationID, messageID, userID) = (vector.correlationId, vector.messageId, vector.userId)
        headers = try vector.headers.mapValues { header in
            if let text = header.string { return .string(text) }
            if let number = header.integer { return .integer(number) }
            return .bytes(bytes(try #require(header.bytes)))
        }
    }
}

private func bytes(_ hex: String) -> [UInt8] {
    let digits = Array(hex.utf8)
    return stride(from: 0, to: digits.count - 1, by: 2).map {
        UInt8(String(decoding: digits[$0...$0 + 1], as: UTF8.self), radix: 16) ?? 0
    }
}
