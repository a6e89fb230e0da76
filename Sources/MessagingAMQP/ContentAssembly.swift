import CRabbitMQ
import Messaging

/// Puts a method's content together: a header frame, then as many body frames as its size takes.
struct ContentAssembly {
    struct Content {
        var method: Frame.Method
        var properties: Properties
        var body: [UInt8]
        /// As announced; more than `body` holds when that was over the limit or not wanted.
        var size: UInt64

        /// A quorum queue's count leaves out what came back with a lost connection: the flag alone tells of that.
        var redeliveries: Int {
            guard case .deliver(_, let isRedelivered, _, _) = method else { return 0 }
            return max(properties.deliveryCount ?? 0, isRedelivered ? 1 : 0)
        }
    }

    private var content: Content?
    private var received: UInt64 = 0
    private var limit = 0

    /// Takes nothing.
    init() {}

    init(_ method: Frame.Method, keepsBody: Bool = true) {
        content = Content(method: method, properties: Properties(), body: [], size: .max)
        limit = keepsBody ? Message.maximumBody : 0
    }

    /// The content when this frame completes it.
    mutating func add(_ frame: Frame) -> Content? {
        switch frame {
        case .header(_, let size, let properties):
            content?.properties = properties
            content?.size = size
            if limit > 0, size <= UInt64(limit) { content?.body.reserveCapacity(Int(size)) }
        case .body(_, let bytes):
            received += UInt64(bytes.count)
            if let size = content?.size, size <= UInt64(limit) { content?.body += bytes }
        case .method: return nil
        }
        guard let content, received >= content.size else { return nil }
        self = ContentAssembly()
        return content
    }
}
