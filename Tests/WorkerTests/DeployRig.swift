import Deploy
import FlotillaProtocol
import GRPCCore
import Glibc
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf
import Synchronization
import TestKit
import Testing

@testable import Worker

/// A host with made devices, and the deploy service without a bus before it. Every handler is as good as a process of
/// its own: handlers share nothing but what lies on disk.
struct DeployRig: Sendable {
    let machine: VgpuMachine
    let uri: String
    /// What libvirt's test driver knows is gone with the last connection.
    private let connection: LibvirtConnection
    var root: String { machine.folder.path }

    /// All tests of a process share `test:///default`: domains have names of their own.
    init(uri: String = "test:///default") throws {
        machine = try VgpuMachine()
        self.uri = uri
        connection = try LibvirtConnection(uri: uri)
        for folder in ["pool", "worker", "sys/bus/pci/drivers/vfio-pci", "sys/class/iommu/dmar0"] {
            _ = try machine.folder.sub(folder)
        }
    }

    /// A GPU with an IOMMU group of its own, if not another, on NVIDIA's driver.
    func gpu(_ bus: String, device: String = "0x20b5", group: UInt32? = nil, mdev: Bool = false) throws {
        let address = "0000:\(bus):00.0"
        let types = [(id: "nvidia-222", name: "GRID T4-2Q", available: 4)]
        if mdev { try machine.mdevGPU(address, types) }
        try machine.function(
            address, ["device": "\(device)\n", "class": "0x030200\n", "numa_node": "-1\n", "reset": ""])
        let folder = try machine.folder.sub("sys/kernel/iommu_groups/\(group ?? UInt32(bus, radix: 16) ?? 0)")
        try #require(symlink(folder, "\(root)/sys/bus/pci/devices/\(address)/iommu_group") == 0)
        try bind(address, "nvidia")
    }

    func bind(_ address: String, _ driver: String) throws {
        let link = "\(root)/sys/bus/pci/devices/\(address)/driver"
        unlink(link)
        try #require(symlink("\(root)/sys/bus/pci/drivers/\(driver)", link) == 0)
    }

    /// The host begins to use the device: it is a network interface that is up.
    func use(_ bus: String) throws {
        let folder = "bus/pci/devices/0000:\(bus):00.0/net/eth9"
        try machine.put("\(folder)/operstate", "up\n")
        try Files.createDirectories(machine.sysfs.path("class/net"))
        try #require(symlink("../../\(folder)", machine.sysfs.path("class/net/eth9")) == 0)
    }

    func configuration() -> WorkerConfiguration {
        Self.configuration(root, uri, machine.devices)
    }

    static func configuration(_ root: String, _ uri: String, _ devices: DeviceHost) -> WorkerConfiguration {
        var configuration = WorkerConfiguration(
            host: "kvm1", libvirtURI: uri, pools: [PoolFolder(name: "pool", path: "\(root)/pool")],
            sourceFolders: ["/"], stateDirectory: "\(root)/worker")
        configuration.devices = devices
        return configuration
    }

    func handler(
        mayAct: Bool = true, permit: @escaping @Sendable () async throws -> Void = {}
    ) -> DeployHandler {
        DeployHandler(
            configuration: configuration(), permit: { _, _ in try await permit() }, mayAct: { _ in mayAct },
            announce: {})
    }

    /// A small BIOS VM with these devices, whose disk is there.
    func request(
        _ name: String, _ devices: [AssignedDevice], _ change: (inout DeployRequest) -> Void = { _ in }
    ) throws -> DeployRequest {
        try Self.request(root, name, devices, change)
    }

    static func request(
        _ root: String, _ name: String, _ devices: [AssignedDevice], _ change: (inout DeployRequest) -> Void = { _ in }
    ) throws -> DeployRequest {
        let image = "\(root)/pool/\(name).raw"
        try Files.writeAtomically([UInt8](repeating: 0, count: 1 << 16), to: image)
        var request = DeployRequest.with {
            $0.mode = .deploy
            $0.options.gpu = .gpuRequire
            $0.options.domainName = name
            $0.manifest = .with {
                $0.schemaVersion = 1
                $0.migrationID = "m-\(name)"
                $0.vm = .with {
                    ($0.name, $0.guestID, $0.firmware) = (name, "debian12_64Guest", .bios)
                    $0.cpu = .with { ($0.count, $0.coresPerSocket) = (1, 1) }
                    $0.memory.bytes = 64 << 20
                }
                $0.disks = [
                    .with {
                        ($0.id, $0.capacityBytes, $0.controller) = ("disk0", 1 << 16, .sata)
                        $0.target = .with { ($0.path, $0.format) = (image, "raw") }
                    }
                ]
                $0.gpus = devices
            }
        }
        change(&request)
        return request
    }

    var entries: [String] {
        get throws {
            try machine.ledger.reservations().map { "\($0.resource.key) \($0.owner.domain) \($0.state.rawValue)" }
        }
    }

    func domain(_ name: String) throws -> LibvirtDomain? { try connection.domain(named: name) }
}

extension VgpuMachine {
    var devices: DeviceHost {
        DeviceHost(sysfs: sysfs, kernel: kernel, tools: tools, folder: "\(folder.path)/state")
    }
}

let a100 = AssignedDevice.with {
    ($0.id, $0.classCode) = ("gpu0", 0x0302)
    $0.passthrough.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) }
}
let t4Profile = AssignedDevice.with {
    ($0.id, $0.classCode) = ("gpu1", 0x0302)
    $0.vgpu.profile = "grid_t4-2q"
}

extension DeployHandler {
    /// As a bus would call it.
    @discardableResult
    func run(_ request: DeployRequest, fence: UInt64 = 1) async throws -> DeployResult {
        let call = CallIdentity(
            task: Stage.deploy.taskID(ofMigration: request.manifest.migrationID), attempt: UInt32(fence), fence: fence)
        return try await answer(call) { context in
            try await deploy(request: ServerRequest(metadata: call.metadata, message: request), context: context)
        }
    }

    @discardableResult
    func takeBack(_ name: String, fence: UInt64 = 9, force: Bool = true) async throws -> DeployResult {
        let call = CallIdentity(task: Stage.undeploy.taskID(ofMigration: "m-\(name)"), attempt: 1, fence: fence)
        let request = UndeployRequest.with { ($0.migrationID, $0.domainName, $0.force) = ("m-\(name)", name, force) }
        return try await answer(call) { context in
            try await undeploy(request: ServerRequest(metadata: call.metadata, message: request), context: context)
        }
    }

    private func answer(
        _ call: CallIdentity,
        _ method: @escaping @Sendable (ServerContext) async throws -> StreamingServerResponse<DeployUpdate>
    ) async throws -> DeployResult {
        try await withServerContextRPCCancellationHandle { handle in
            let context = ServerContext(
                descriptor: DeployService.Method.Deploy.descriptor, remotePeer: "test", localPeer: "test",
                cancellation: handle)
            let contents = try await method(context).accepted.get()
            let updates = Updates()
            _ = try await contents.producer(RPCWriter(wrapping: updates))
            return try #require(updates.last)
        }
    }
}

private final class Updates: RPCWriterProtocol {
    private let result = Mutex<DeployResult?>(nil)
    var last: DeployResult? { result.withLock { $0 } }

    func write(_ element: DeployUpdate) async throws {
        if case .result(let found) = element.update { result.withLock { $0 = found } }
    }

    func write(contentsOf elements: some Sequence<DeployUpdate>) async throws {
        for element in elements { try await write(element) }
    }
}

/// The `MigrationError` that `body` throws; nil when it throws none, or another.
func failure(_ body: () async throws -> some Any) async -> MigrationError? {
    do {
        _ = try await body()
        return nil
    } catch { return error as? MigrationError }
}
