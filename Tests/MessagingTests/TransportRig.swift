import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import Synchronization
import TestKit
import Testing

/// A handler that does what its request says, through the generated service protocol.
struct ScriptedConvert: ConvertService.ServiceProtocol {
    let transport: BusServerTransport

    func convert(
        request: ServerRequest<ConvertRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<ConvertUpdate> {
        let call = try CallIdentity(request.metadata)
        return StreamingServerResponse { writer in
            switch request.message.domainName {
            case "fail":
                throw MigrationError(.dataLoss, "disk0: grain 7 is damaged", hint: "export it again")
            case "wait":
                try await writer.write(.with { $0.step.message = "waiting" })
                try await Task.sleep(for: .seconds(3600))
            case "deaf":
                try await writer.write(.with { $0.step.message = "working" })
                await Task.detached { try? await Task.sleep(for: .milliseconds(500)) }.value
            case "permit":
                try await transport.permit("define-domain", for: call)
            default:
                for number in 1...3 { try await writer.write(.with { $0.progress.bytesDone = UInt64(number) }) }
            }
            try await writer.write(.with { $0.result.disks = [.with { $0.id = "disk0" }] })
            return [:]
        }
    }
}

/// A service of its own, whose tasks are `prompt`.
struct ScriptedDeploy: DeployService.ServiceProtocol {
    func deploy(
        request: ServerRequest<DeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> { StreamingServerResponse { _ in [:] } }

    func undeploy(
        request: ServerRequest<UndeployRequest>, context: ServerContext
    ) async throws -> StreamingServerResponse<DeployUpdate> { StreamingServerResponse { _ in [:] } }
}

/// A worker's transport with a scripted handler, and the coordinator's end of the bus.
final class TransportRig: Sendable {
    let bus = InProcessBus()
    let names = Names()
    let ledger = MemoryLedger()
    let members = FleetMember.pair(host: "kvm1")
    let transport: BusServerTransport
    private let server: GRPCServer<BusServerTransport>
    private let serving: Mutex<Task<Void, any Error>?> = Mutex(nil)

    init(
        heartbeat: Duration = .seconds(10), lease: Duration = .seconds(60), silenceLimit: Duration = .seconds(900)
    ) {
        var settings = BusServerTransport.Settings(slots: 2, heartbeat: heartbeat, leaseDuration: lease)
        settings.requireRequest = { _, body in _ = try ConvertRequest(serializedBytes: body) }
        settings.silenceLimit = silenceLimit
        settings.prompt = [DeployService.descriptor]
        transport = BusServerTransport(
            bus: bus, names: names, member: members.worker, settings: settings, ledger: ledger,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        server = GRPCServer(
            transport: transport, services: [ScriptedConvert(transport: transport), ScriptedDeploy()],
            interceptors: [ErrorInterceptor()])
    }

    /// Serves, hands the events to `body`, and ends.
    func run(_ body: (inout Events) async throws -> Void) async throws {
        try await bus.declare(names.topology(hosts: ["kvm1"]))
        let subscription = try await bus.subscribe(names.coordinatorEvents, prefetch: 1000)
        let serving = Task { try await server.serve() }
        var events = Events(subscription.deliveries.makeAsyncIterator(), members.coordinator)
        try await body(&events)
        transport.stopNow()
        try await serving.value
    }

    func send(
        _ script: String, task: String = "m-convert", fence: UInt64 = 1, host: String = "kvm1",
        deadline: Moment? = nil, method: String = "flotilla.v1.ConvertService/Convert", from sender: FleetMember? = nil,
        validity: Duration = .seconds(60), _ change: (inout Messaging.Message) -> Void = { _ in }
    ) async throws {
        let request = ConvertRequest.with { $0.domainName = script }
        let call = TaskCall(
            identity: CallIdentity(task: task, attempt: UInt32(fence), fence: fence), method: method, audience: host,
            deadline: deadline, body: try request.serializedBytes())
        var message = call.message(names, messageID: "\(task)-\(fence)")
        (sender ?? members.coordinator).sign(&message, for: host, validity: validity)
        message.routingKey = "kvm1"
        change(&message)
        try await bus.publish(message)
    }

    func cancel(_ task: String = "m-convert", fence: UInt64, _ reason: String) async throws {
        try await tell(
            .with {
                $0.taskID = task
                $0.fence = fence
                $0.cancel.reason = reason
            })
    }

    /// Says that the end of this attempt is stored.
    func confirm(fence: UInt64) async throws {
        try await tell(
            .with {
                $0.taskID = "m-convert"
                $0.fence = fence
                $0.stored = ResultStored()
            })
    }

    func tell(_ control: ControlMessage) async throws {
        var message = Messaging.Message(
            exchange: names.control, routingKey: "kvm1",
            body: try ControlMessages.with { $0.messages = [control] }.serializedBytes())
        message.type = "flotilla.v1.ControlMessages"
        members.coordinator.sign(&message, for: "kvm1", validity: .seconds(60))
        try await bus.publish(message)
    }

    func deadLetter() async throws -> Messaging.Message? {
        let dead = try await bus.subscribe(names.dead, prefetch: 1)
        var iterator = dead.deliveries.makeAsyncIterator()
        let delivery = await iterator.next(isolation: #isolation)
        await delivery?.settle(.ack)
        dead.cancel()
        return delivery?.message
    }
}

struct Events {
    var iterator: AsyncStream<Delivery>.Iterator
    let coordinator: FleetMember
    private var read: [WorkerEvent] = []

    init(_ iterator: AsyncStream<Delivery>.Iterator, _ coordinator: FleetMember) {
        self.iterator = iterator
        self.coordinator = coordinator
    }

    /// The next event of any kind.
    mutating func any() async throws -> WorkerEvent {
        while read.isEmpty {
            let next = await iterator.next(isolation: #isolation)
            let delivery = try #require(next)
            await delivery.settle(.ack)
            #expect(try coordinator.verify(delivery.message) == "kvm1")
            read = try WorkerEvents(serializedBytes: delivery.message.body).events
        }
        return read.removeFirst()
    }

    /// The next that is about a task.
    mutating func next() async throws -> TaskEvent {
        while true { if case .task(let event) = try await any().event { return event } }
    }

    mutating func rejected() async throws -> MessageRejected {
        while true { if case .rejected(let rejected) = try await any().event { return rejected } }
    }

    /// Skips to the first event of which `pick` makes something.
    mutating func first<Value>(_ pick: (TaskEvent) -> Value?) async throws -> Value {
        while true { if let value = pick(try await next()) { return value } }
    }

    mutating func accepted() async throws -> TaskEvent {
        try await first { if case .accepted = $0.kind { $0 } else { nil } }
    }

    mutating func ended() async throws -> TaskEnded {
        try await first { if case .ended(let ended) = $0.kind { ended } else { nil } }
    }

    mutating func update() async throws {
        _ = try await first { if case .update = $0.kind { true } else { nil } }
    }
}
