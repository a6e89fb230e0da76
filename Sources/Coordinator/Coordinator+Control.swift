import FlotillaProtocol
import FoundationEssentials
import Logging
import Messaging
import SwiftProtobuf
import Synchronization

/// What workers are told, to each in the order of the decisions. A host whose queue takes nothing for now keeps no
/// decision and no other host waiting.
extension Coordinator {
    /// In one process, where publishing waits for nobody, returns when it is in the hosts' queues.
    func tell(_ messages: [String: [ControlMessage]]) async {
        control.add(messages)
        if bus.isDurable { return control.signal() }
        await withDiscardingTaskGroup { group in
            for host in control.begin() { group.addTask { await self.sendControl(to: host) } }
        }
    }

    func publishControl() async {
        control.signal()
        await withDiscardingTaskGroup { group in
            for await _ in control.signals {
                for host in control.begin() { group.addTask { await self.sendControl(to: host) } }
            }
        }
    }

    private func sendControl(to host: String) async {
        while let messages = control.next(for: host) {
            do {
                // A few hundred small messages stay far below a message's limit.
                for start in stride(from: 0, to: messages.count, by: 512) {
                    try await send(.with { $0.messages = Array(messages[start...].prefix(512)) }, to: host)
                }
            } catch {
                // Whoever waits for it asks again: heartbeats, permits and results are all repeated. The rest goes
                // with it, or what waits for a queue without a majority would grow.
                logger.warning("control message not sent", metadata: ["host": "\(host)", "error": "\(error)"])
            }
        }
    }

    private func send(_ messages: ControlMessages, to host: String) async throws {
        var message = Message(
            exchange: settings.names.control, routingKey: host, body: try messages.serializedBytes())
        message.type = "flotilla.v1.ControlMessages"
        message.messageID = UUID().uuidString.lowercased()
        member.sign(&message, for: host, validity: settings.controlValidity)
        try await bus.publish(message)
    }
}

/// What waits to be told to hosts, and to which of them somebody is talking.
final class ControlOutbox: Sendable {
    let signals: AsyncStream<Void>
    private let continuation: AsyncStream<Void>.Continuation
    private let state = Mutex<(waiting: [String: [ControlMessage]], busy: Set<String>)>(([:], []))

    init() { (signals, continuation) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(1)) }

    func signal() { continuation.yield() }

    func add(_ messages: [String: [ControlMessage]]) {
        state.withLock { $0.waiting.merge(messages) { $0 + $1 } }
    }

    /// The hosts for which something waits and to which nobody talks: the caller has to, until `next` is nil.
    func begin() -> [String] {
        state.withLock { state in
            let hosts = state.waiting.keys.filter { !state.busy.contains($0) }
            state.busy.formUnion(hosts)
            return hosts
        }
    }

    func next(for host: String) -> [ControlMessage]? {
        state.withLock { state in
            let messages = state.waiting.removeValue(forKey: host)
            if messages == nil { state.busy.remove(host) }
            return messages
        }
    }
}
