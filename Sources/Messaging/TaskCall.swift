package import GRPCCore
package import MigrationModel
package import SwiftProtobuf

/// A gRPC method that can be called over the bus, with its message types. Generated methods conform by name alone.
package protocol BusMethod: Sendable {
    associatedtype Input: SwiftProtobuf.Message
    /// The element of the response stream.
    associatedtype Output: SwiftProtobuf.Message
    static var descriptor: MethodDescriptor { get }
}

/// A task as it travels: one gRPC call with its identity, audience and absolute deadline.
package struct TaskCall: Sendable, Equatable {
    package var identity: CallIdentity
    /// "flotilla.v1.ConvertService/Convert".
    package var method: String
    /// The host it is for.
    package var audience: String
    /// When the answer stops being of use. Absolute: a relative timeout goes stale in a queue.
    package var deadline: Moment?
    /// W3C Trace Context.
    package var traceparent: String?
    /// The request message, serialized.
    package var body: [UInt8]

    package init(
        identity: CallIdentity, method: String, audience: String, deadline: Moment? = nil, body: [UInt8]
    ) {
        self.identity = identity
        self.method = method
        self.audience = audience
        self.deadline = deadline
        self.body = body
    }

    package static let contentType = "application/grpc+proto"

    private enum Header {
        static let attempt = "flotilla-attempt"
        static let fence = "flotilla-fence"
        static let deadline = "deadline-unix-ms"
        static let traceparent = "traceparent"
    }

    /// The task as it travels, to be signed for its audience.
    package func message(_ names: Names, messageID: String) -> Message {
        var message = Message(exchange: names.tasks, routingKey: audience, body: body)
        message.type = "/\(method)"
        message.contentType = Self.contentType
        message.correlationID = identity.task
        message.messageID = messageID
        message.headers = [
            Header.attempt: .integer(Int64(identity.attempt)),
            Header.fence: .integer(Int64(clamping: identity.fence)),
        ]
        if let deadline { message.headers[Header.deadline] = .integer(deadline.milliseconds) }
        if let traceparent { message.headers[Header.traceparent] = .string(traceparent) }
        return message
    }

    /// Decodes a message that was verified to be for `audience`. Throws `invalidArgument` saying which part of it is
    /// missing or wrong.
    package init(decoding message: Message, audience: String) throws {
        try message.requireSize()
        guard message.type.first == "/", message.type.count > 1 else {
            throw MigrationError(.invalidArgument, "property type '\(message.type)' names no gRPC method")
        }
        guard Self.isIdentifier(message.correlationID) else {
            throw MigrationError(.invalidArgument, "property correlation-id '\(message.correlationID)' is no task id")
        }
        guard let attempt = message.headers[Header.attempt]?.integer.flatMap(UInt32.init(exactly:)), attempt > 0,
            let fence = message.headers[Header.fence]?.integer.flatMap(UInt64.init(exactly:)), fence > 0
        else { throw MigrationError(.invalidArgument, "headers \(Header.attempt) and \(Header.fence) are needed") }
        let deadline = message.headers[Header.deadline]?.integer
        guard (0..<1 << 53).contains(deadline ?? 0) else {
            throw MigrationError(.invalidArgument, "header \(Header.deadline) is no time in milliseconds")
        }
        self.init(
            identity: CallIdentity(task: message.correlationID, attempt: attempt, fence: fence),
            method: String(message.type.dropFirst()), audience: audience,
            deadline: deadline.map(Moment.init(milliseconds:)), body: message.body)
        traceparent = message.headers[Header.traceparent]?.string
    }

    /// Task ids become file names on the worker: letters, digits and inner `-` and `_` only, at most 128.
    package static func isIdentifier(_ text: String) -> Bool {
        let allowed = text.utf8.allSatisfy {
            switch $0 {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "_"):
                true
            default: false
            }
        }
        return allowed && !text.isEmpty && text.utf8.count <= 128 && text.first != "-"
    }
}

extension CallIdentity {
    private enum Key {
        static let task = "flotilla-task"
        static let attempt = "flotilla-attempt"
        static let fence = "flotilla-fence"
    }

    /// The metadata a handler finds its identity in.
    package var metadata: Metadata {
        [Key.task: "\(task)", Key.attempt: "\(attempt)", Key.fence: "\(fence)"]
    }

    /// Throws `failedPrecondition` for a call that no coordinator issued.
    package init(_ metadata: Metadata) throws {
        guard let task = metadata[stringValues: Key.task].first(where: { _ in true }),
            let attempt = metadata[stringValues: Key.attempt].first(where: { _ in true }).flatMap({ UInt32($0) }),
            let fence = metadata[stringValues: Key.fence].first(where: { _ in true }).flatMap({ UInt64($0) })
        else {
            throw MigrationError(.failedPrecondition, "the call carries no task identity in its metadata")
        }
        self.init(task: task, attempt: attempt, fence: fence)
    }
}
