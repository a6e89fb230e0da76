package import FlotillaProtocol
import HostKit
package import MigrationModel
import SwiftProtobuf

/// Publishes what a worker has to say, under its own name.
package struct EventPublisher: Sendable {
    private let bus: any MessageBus
    private let names: Names
    private let host: String

    package init(bus: any MessageBus, names: Names, host: String) {
        self.bus = bus
        self.names = names
        self.host = host
    }

    package func publish(_ event: TaskEvent, kind: String) async throws {
        try await publish(.task(event), kind: kind, correlationID: event.taskID)
    }

    package func publish(_ inventory: HostProfile) async throws {
        try await publish(.inventory(inventory), kind: "inventory", correlationID: "")
    }

    private func publish(_ event: WorkerEvent.OneOf_Event, kind: String, correlationID: String) async throws {
        let envelope = WorkerEvent.with {
            $0.host = host
            $0.time = Moment.now.timestamp
            $0.event = event
        }
        var message = Message(
            exchange: names.events, routingKey: names.eventKey(host: host, kind: kind),
            body: try envelope.serializedBytes())
        message.type = "flotilla.v1.WorkerEvent"
        message.correlationID = correlationID
        message.userID = host
        try await bus.publish(message)
    }
}

extension TaskEvent {
    package init(_ call: CallIdentity, sequence: UInt64, _ kind: OneOf_Kind) {
        self.init()
        taskID = call.task
        attempt = call.attempt
        fence = call.fence
        seq = sequence
        self.kind = kind
    }

    package var identity: CallIdentity { CallIdentity(task: taskID, attempt: attempt, fence: fence) }
}
