import CLibvirt
import Glibc
import HostKit
import MigrationModel
import Synchronization

/// A connection that is being made: libvirt itself waits without an end. One that comes too late is closed again.
private final class Opening: Sendable {
    private enum State {
        case waiting, givenUp
        case ended(Result<UInt, MigrationError>)
    }

    private let uri: String
    private let state = Mutex(State.waiting)
    private let ended = MonotonicSemaphore()

    init(_ uri: String) {
        self.uri = uri
        spawnThread("libvirt open") { self.open() }
    }

    private func open() {
        let pointer = virConnectOpen(uri)
        // libvirt's last error is this thread's.
        let result = pointer.map { Result<UInt, MigrationError>.success(UInt(bitPattern: $0)) } ?? .failure(failure())
        let isLate = state.withLock { state in
            if case .givenUp = state { return true }
            state = .ended(result)
            return false
        }
        if isLate, let pointer { virConnectClose(pointer) }
        ended.signal()
    }

    private func failure() -> MigrationError {
        var error = libvirtError("connect to \(uri)")
        if error.code != .unauthenticated && error.code != .permissionDenied { error.code = .unavailable }
        error.hint =
            "check that the daemon runs (`systemctl status virtqemud libvirtd`) and that this user may use it "
            + "(group libvirt, or root)"
        return error
    }

    func wait(for limit: Duration) throws -> OpaquePointer {
        _ = ended.wait(for: limit)
        let result = state.withLock { state -> Result<UInt, MigrationError>? in
            if case .ended(let result) = state { return result }
            state = .givenUp
            return nil
        }
        guard let address = try result?.get(), let pointer = OpaquePointer(bitPattern: address) else {
            throw MigrationError(
                .unavailable, "connect to \(uri): the daemon has not answered for \(limit.components.seconds) s",
                hint: "look at what it waits for (its log, `systemctl status virtqemud libvirtd`), or restart it")
        }
        return pointer
    }
}

/// A connection to the local libvirt daemon. libvirt allows calls from any thread; each blocks until the daemon has
/// answered, so callers go through `HostKit.blocking`. Closes when the last reference, a domain's included, is gone.
package final class LibvirtConnection: Sendable {
    package let uri: String
    // Owned: closed in deinit. libvirt's own lock guards it.
    nonisolated(unsafe) let pointer: OpaquePointer

    /// Without a handler libvirt prints every error to stderr; without an event loop, which has to be there before the first
    /// connection, nobody asks whether a daemon that is silent is still alive.
    private static let prepared: Bool = {
        virInitialize()
        virSetErrorFunc(nil) { _, _ in }
        if virEventRegisterDefaultImpl() == 0 {
            spawnThread("libvirt events") { while virEventRunDefaultImpl() == 0 {} }
        }
        return true
    }()

    /// - Parameters:
    ///   - uri: a local one: `qemu:///system`, `qemu:///system?socket=…`, `test:///default`.
    ///   - interval: in seconds. Calls on a daemon that doesn't so much as answer at six such intervals fail with
    ///     `unavailable`, and so does the connection; one that is only busy does answer.
    ///   - patience: with a daemon whose socket takes a connection and that then stands still.
    /// - Throws: `failedPrecondition` for a URI that names a remote server, `unavailable` when no daemon answers.
    package init(
        uri: String = "qemu:///system", keepAlive interval: Int32 = 10, patience: Duration = .seconds(60)
    ) throws {
        try Self.requireLocal(uri)
        _ = Self.prepared
        pointer = try Opening(uri).wait(for: patience)
        self.uri = uri
        // Not known to the test driver, which is no daemon, nor to daemons of old.
        _ = virConnectSetKeepAlive(pointer, interval, 6)
    }

    deinit { virConnectClose(pointer) }

    /// False once the daemon has hung up: a restarted daemon needs a new connection.
    package var isAlive: Bool { virConnectIsAlive(pointer) == 1 }

    /// Disks, GPUs and console logs are this host's: a connection to another one would mix up two machines.
    static func requireLocal(_ uri: String) throws {
        guard let colon = uri.firstIndex(of: ":"), uri[colon...].hasPrefix("://") else {
            throw MigrationError(
                .invalidArgument, "\"\(uri)\" is not a libvirt URI", hint: "for example qemu:///system")
        }
        let scheme = uri[..<colon].split(separator: "+", omittingEmptySubsequences: false)
        guard let driver = scheme.first, driver == "qemu" || driver == "test", scheme.count <= 2 else {
            throw MigrationError(
                .invalidArgument, "\(uri): only QEMU domains can be deployed", hint: "for example qemu:///system")
        }
        let transport = scheme.count == 2 ? scheme[1] : "unix"
        guard transport == "unix", uri[colon...].dropFirst(3).hasPrefix("/") else {
            throw MigrationError(
                .failedPrecondition, "\(uri) names a remote server; disks and GPUs must be local to libvirt",
                hint: "run the worker on that host")
        }
    }

    /// libvirt's version, "9.0.0".
    package func libraryVersion() throws -> String {
        var number: UInt = 0
        guard virConnectGetLibVersion(pointer, &number) == 0 else { throw libvirtError("version of \(uri)") }
        return version(number)
    }

    /// "QEMU", "TEST".
    package func hypervisor() throws -> String {
        guard let name = virConnectGetType(pointer) else { throw libvirtError("type of \(uri)") }
        return String(cString: name)
    }

    package func hypervisorVersion() throws -> String {
        var number: UInt = 0
        guard virConnectGetVersion(pointer, &number) == 0 else { throw libvirtError("hypervisor version of \(uri)") }
        return version(number)
    }

    /// CPUs and bytes of memory of the host.
    package func node() throws -> (cpus: UInt32, memoryBytes: UInt64) {
        var info = virNodeInfo()
        guard virNodeGetInfo(pointer, &info) == 0 else { throw libvirtError("node information of \(uri)") }
        return (info.cpus, UInt64(info.memory) * 1024)
    }

    /// Names of the active virtual networks.
    package func networks() throws -> [String] {
        var list: UnsafeMutablePointer<OpaquePointer?>?
        let count = virConnectListAllNetworks(pointer, &list, UInt32(VIR_CONNECT_LIST_NETWORKS_ACTIVE.rawValue))
        guard count >= 0 else { throw libvirtError("list the networks of \(uri)") }
        defer { free(list) }
        return (0..<Int(count)).compactMap { index in
            guard let network = list?[index] else { return nil }
            defer { virNetworkFree(network) }
            return virNetworkGetName(network).map { String(cString: $0) }
        }.sorted()
    }

    package func domains() throws -> [LibvirtDomain] {
        var list: UnsafeMutablePointer<OpaquePointer?>?
        let count = virConnectListAllDomains(pointer, &list, 0)
        guard count >= 0 else { throw libvirtError("list the domains of \(uri)") }
        defer { free(list) }
        return (0..<Int(count)).compactMap { index in
            list?[index].map { LibvirtDomain(owning: $0, of: self) }
        }
    }

    /// Nil when there is no domain of this name.
    package func domain(named name: String) throws -> LibvirtDomain? {
        if let domain = virDomainLookupByName(pointer, name) { return LibvirtDomain(owning: domain, of: self) }
        guard lastLibvirtError().0 == VIR_ERR_NO_DOMAIN else { throw libvirtError("look up domain \(name)") }
        return nil
    }

    func domain(uuid: String) throws -> LibvirtDomain? {
        if let domain = virDomainLookupByUUIDString(pointer, uuid) { return LibvirtDomain(owning: domain, of: self) }
        guard lastLibvirtError().0 == VIR_ERR_NO_DOMAIN else { throw libvirtError("look up domain \(uuid)") }
        return nil
    }

    /// Defines a persistent domain after checking it against libvirt's schema.
    func define(_ xml: String, name: String) throws -> LibvirtDomain {
        guard let domain = virDomainDefineXMLFlags(pointer, xml, UInt32(VIR_DOMAIN_DEFINE_VALIDATE.rawValue)) else {
            throw libvirtError("define domain \(name)")
        }
        return LibvirtDomain(owning: domain, of: self)
    }

    /// Capabilities document of q35 domains of this type ("kvm", "qemu"), or why there is none.
    func domainCapabilities(type: String) -> Result<String, MigrationError> {
        let text = virConnectGetDomainCapabilities(pointer, nil, "x86_64", "q35", type, 0)
        return takeString(text).map { .success($0) } ?? .failure(libvirtError("capabilities of \(type) domains"))
    }

    /// Whom QEMU runs as, where libvirt changes the user for it.
    func qemuUser() -> (user: uid_t, group: gid_t)? {
        takeString(virConnectGetCapabilities(pointer)).flatMap(qemuUser(inCapabilities:))
    }

    private func version(_ number: UInt) -> String {
        "\(number / 1_000_000).\(number / 1000 % 1000).\(number % 1000)"
    }
}
