import Coordinator
import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import GRPCInProcessTransport
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

/// A coordinator on a store that outlives it, its API, and the worker's end of the bus in the test's hands.
struct Rig {
    typealias Client = CoordinatorService.Client<InProcessTransport.Client>

    static let host = "kvm1"

    let folder: TemporaryFolder
    var members = FleetMember.pair(host: host)
    var policy = TaskMachine.Policy()
    var startsOnlySubmitted = false
    var acceptanceTimeout = Duration.seconds(120)
    var hostInterval = Duration.seconds(5)

    init(policy: TaskMachine.Policy = .init()) throws {
        folder = try TemporaryFolder()
        self.policy = policy
    }

    /// One coordinator process: runs around `body` with a bus of its own, and ends as abruptly as a task can.
    func process(
        on bus: any MessageBus = InProcessBus(), _ body: (Client, inout FakeWorker) async throws -> Void
    ) async throws {
        let names = Names()
        var settings = Coordinator.Settings(
            names: names, policy: policy, tick: .milliseconds(10), startsOnlySubmitted: startsOnlySubmitted)
        settings.acceptanceTimeout = acceptanceTimeout
        settings.hostInterval = hostInterval
        let coordinator = Coordinator(
            store: try SQLiteStore(path: "\(folder.path)/store.sqlite"), bus: bus, member: members.coordinator,
            settings: settings,
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        try await bus.declare(names.topology(hosts: [Self.host]))
        let transport = InProcessTransport()
        let server = GRPCServer(
            transport: transport.server, services: [CoordinatorAPI(coordinator)], interceptors: [ErrorInterceptor()])
        let client = GRPCClient(transport: transport.client)
        let running = [
            Task { try await coordinator.run { [Self.host] } }, Task { try await server.serve() },
            Task { try await client.runConnections() },
        ]
        var worker = try await FakeWorker(bus, names, members.worker)
        try await worker.announce()
        do {
            try await body(Client(wrapping: client), &worker)
        } catch {
            for task in running { task.cancel() }
            throw error
        }
        for task in running { task.cancel() }
        for task in running { _ = await task.result }
    }

    static let request = SubmitMigrationRequest.with {
        $0.sourceURL = "ova:/images/web.ova"
        $0.host = host
        $0.pool = "fast"
        $0.format = "qcow2"
        $0.options.networks = [
            .with {
                $0.source = "VM Network"
                $0.bridge = "br0"
            }
        ]
    }

    /// With a vGPU that no host offers.
    static let manifestWithVgpu: Manifest = {
        var manifest = Rig.manifest
        manifest.gpus = [
            .with {
                $0.id = "gpu0"
                $0.vgpu.profile = "grid_a100-40c"
            }
        ]
        return manifest
    }()

    static let manifest = Manifest.with {
        $0.schemaVersion = 1
        $0.source.fingerprint = "f1"
        $0.vm.name = "web"
        $0.vm.memory.bytes = 1 << 30
        $0.vm.cpu.count = 1
        $0.disks = [
            .with {
                $0.id = "disk0"
                $0.capacityBytes = 1 << 20
            }
        ]
        $0.nics = [
            .with {
                $0.id = "nic0"
                $0.network = "VM Network"
            }
        ]
    }
}

/// Says what a worker would.
struct FakeWorker {
    private let names: Names
    private let member: FleetMember
    private let bus: any MessageBus
    private let events: EventPublisher
    private var tasks: AsyncStream<Delivery>.Iterator
    private var control: AsyncStream<Delivery>.Iterator
    private var heard: [ControlMessage] = []
    private var sequence: UInt64 = 0
    var profile: HostProfile

    init(_ bus: any MessageBus, _ names: Names, _ member: FleetMember) async throws {
        (self.names, self.member, self.bus) = (names, member, bus)
        let host = member.name
        events = EventPublisher(bus: bus, names: names, member: member)
        tasks = try await bus.subscribe(names.tasks(of: host), prefetch: 10).deliveries.makeAsyncIterator()
        control = try await bus.subscribe(names.control(of: host), prefetch: 10).deliveries.makeAsyncIterator()
        profile = .with {
            $0.name = host
            $0.domainType = "kvm"
            $0.memoryBytes = 64 << 30
            $0.cpus = 32
            $0.bridges = ["br0"]
            $0.pools = [
                .with {
                    $0.name = "fast"
                    $0.path = "/pool"
                    $0.freeBytes = 1 << 40
                    $0.writable = true
                }
            ]
        }
    }

    func announce() async throws { try await events.publish(.inventory(profile)) }

    func heartbeat() async throws { try await events.publish(.heartbeat(HostHeartbeat())) }

    /// Publishes what somebody with this worker's place on the bus, but another key, would say.
    func forge(_ kind: TaskEvent.OneOf_Kind, of call: TaskCall) async throws {
        let impostor = EventPublisher(
            bus: bus, names: names,
            member: FleetMember(name: member.name, key: SigningKey(), believes: KeyRing([:])))
        try await impostor.publish(TaskEvent(call.identity, sequence: 1, kind))
    }

    /// The next dead letter.
    func deadLetter() async throws -> Messaging.Message? {
        let dead = try await bus.subscribe(names.dead, prefetch: 1)
        defer { dead.cancel() }
        var iterator = dead.deliveries.makeAsyncIterator()
        return await iterator.next(isolation: #isolation)?.message
    }

    /// The next dead letter, in hands that let go of it when they cancel.
    func holdDeadLetter() async throws -> (letter: Messaging.Message, hands: Subscription) {
        let hands = try await bus.subscribe(names.dead, prefetch: 1)
        var iterator = hands.deliveries.makeAsyncIterator()
        let delivery = await iterator.next(isolation: #isolation)
        return (try #require(delivery).message, hands)
    }

    /// Refuses the next task of the queue.
    mutating func reject() async throws -> TaskCall {
        let next = await tasks.next(isolation: #isolation)
        let delivery = try #require(next)
        await delivery.settle(.reject(reason: "a test"))
        return try TaskCall(decoding: delivery.message, audience: member.name)
    }

    /// The next task of the queue, settled.
    mutating func take() async throws -> TaskCall {
        let next = await tasks.next(isolation: #isolation)
        let delivery = try #require(next)
        await delivery.settle(.ack)
        #expect(try member.verify(delivery.message) == FleetMember.coordinator)
        return try TaskCall(decoding: delivery.message, audience: member.name)
    }

    mutating func say(_ call: TaskCall, _ kind: TaskEvent.OneOf_Kind) async throws {
        sequence += 1
        try await events.publish(TaskEvent(call.identity, sequence: sequence, kind))
    }

    mutating func accept(_ call: TaskCall) async throws { try await say(call, .accepted(TaskAccepted())) }

    mutating func succeed(_ call: TaskCall, _ result: some SwiftProtobuf.Message) async throws {
        let bytes: Data = try result.serializedBytes()
        try await say(call, .ended(.with { $0.result = bytes }))
    }

    mutating func fail(_ call: TaskCall, _ code: MigrationError.Code, _ message: String) async throws {
        try await say(
            call,
            .ended(
                .with {
                    $0.code = Int32(code.rawValue)
                    $0.message = message
                }))
    }

    /// Skips to the first control message of which `pick` makes something.
    mutating func told<Value>(_ pick: (ControlMessage) -> Value?) async throws -> Value {
        while true {
            while heard.isEmpty {
                let next = await control.next(isolation: #isolation)
                let delivery = try #require(next)
                await delivery.settle(.ack)
                heard = try ControlMessages(serializedBytes: delivery.message.body).messages
            }
            if let value = pick(heard.removeFirst()) { return value }
        }
    }

    /// Takes a task of the stage and answers it as a worker that works.
    @discardableResult
    mutating func work(_ stage: Stage, manifest: Manifest = Rig.manifest) async throws -> TaskCall {
        let call = try await take()
        #expect(call.identity.task.hasSuffix(stage.rawValue))
        try await accept(call)
        switch stage {
        case .export: try await succeed(call, ExportUpdate.with { $0.result.manifest = manifest })
        case .convert:
            var disks = try ConvertRequest(serializedBytes: call.body).manifest.disks
            for index in disks.indices { disks[index].target.path = "/pool/web-disk\(index).qcow2" }
            try await succeed(call, ConvertUpdate.with { [disks] in $0.result.disks = disks })
        case .undeploy:
            try await succeed(
                call, DeployUpdate.with { $0.result.findings = [.with { $0.message = "0000:3b:00.0 was given back" }] })
        case .deploy:
            try await succeed(
                call,
                DeployUpdate.with {
                    $0.result.domainName = "web"
                    $0.result.domainState = "running"
                })
        }
        _ = try await told { if case .stored = $0.kind { true } else { nil } }
        return call
    }
}

extension Rig.Client {
    /// Until the coordinator knows of the first host's domains.
    func hearOfDomains() async throws {
        while try await listHosts(ListHostsRequest()).hosts.first?.profile.domains.isEmpty != false {
            await Task.yield()
        }
    }

    /// Of its export.
    func attempt(of id: String) async throws -> UInt32 {
        try await getMigration(.with { $0.id = id }).stages[0].attempt
    }

    /// The migration once it has ended.
    func end(_ id: String) async throws -> Migration {
        try await watchMigration(.with { $0.id = id }) { response in
            var last = Migration()
            for try await event in response.messages {
                if case .state(let migration) = event.event { last = migration }
            }
            return last
        }
    }
}
