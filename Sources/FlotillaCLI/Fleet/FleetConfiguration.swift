import Convert
import Deploy
import Download
import HostKit
import Messaging
import MessagingAMQP
import MigrationModel
import VSphere
import Worker

/// What `flotilla coordinator --config` reads.
struct CoordinatorConfiguration {
    var broker: AMQPConfiguration
    var names: Names
    var keys: KeyFiles
    var stateDirectory: String
    /// Unix socket of the API.
    var socket: String
    var policy: TaskMachine.Policy
    /// Broker users who may ask for migrations.
    var requesters: [String]

    init(path: String) throws {
        let file = try ConfigurationSection(
            path: path,
            ["namespace", "state", "socket", "lease", "attempts", "lost-attempts", "requesters"]
                + AMQPConfiguration.settings + KeyFiles.settings)
        broker = try AMQPConfiguration(file.section("broker"), name: FleetMember.coordinator)
        names = Names(namespace: try file.text("namespace", default: "flotilla"))
        keys = try KeyFiles(file)
        stateDirectory = try file.text("state", default: "/var/lib/flotilla")
        socket = try file.text("socket", default: FleetSocket.standard)
        policy = TaskMachine.Policy()
        policy.leaseDuration = try file.duration("lease", default: policy.leaseDuration)
        policy.maximumFailures = try file.number("attempts", default: policy.maximumFailures, in: 1...100)
        policy.maximumLosses = try file.number("lost-attempts", default: policy.maximumLosses, in: 1...1000)
        requesters = try file.texts("requesters")
    }

    func member() throws -> FleetMember { try keys.member(named: FleetMember.coordinator) }
}

/// What `flotilla worker --config` reads.
struct WorkerFile {
    var host: String
    var broker: AMQPConfiguration
    var keys: KeyFiles
    var worker: WorkerConfiguration
    /// How long running tasks may go on after SIGTERM before they are stopped at their last checkpoint.
    var drain: Duration

    init(path: String) throws {
        let file = try ConfigurationSection(
            path: path,
            [
                "host", "libvirt", "pools.name", "pools.path", "sources", "state", "namespace", "tasks", "heartbeat",
                "lease", "rate", "drain",
            ] + AMQPConfiguration.settings + KeyFiles.settings + VSphereSource.settings)
        host = try file.text("host")
        guard FleetMember.isHostName(host) else {
            throw file.problem("host", "'\(host)' can't name a host", hint: FleetMember.hostNameRule)
        }
        let brokerSection = try file.section("broker")
        broker = try AMQPConfiguration(brokerSection, name: host)
        if case .plain(let user, _) = broker.authentication, user != host {
            throw brokerSection.problem(
                "user", "'\(user)' is not the host '\(host)', by whose name the broker lets a worker read and write",
                hint: "leave it away; flotilla fleet definitions makes a broker user \(host)")
        }
        keys = try KeyFiles(file)
        var pools: [PoolFolder] = []
        for section in try file.sections("pools") {
            let pool = PoolFolder(name: try section.text("name"), path: try section.text("path"))
            guard pool.path.hasPrefix("/"), Files.isDirectory(pool.path) else {
                throw section.problem("path", "\(pool.path) is not a folder", hint: "create it, owned by root")
            }
            pools.append(pool)
        }
        guard !pools.isEmpty else { throw file.problem("pools", "has to name at least one folder for disks") }
        worker = WorkerConfiguration(
            host: host, libvirtURI: try file.text("libvirt", default: "qemu:///system"), pools: pools,
            sourceFolders: try file.texts("sources"),
            stateDirectory: try file.text("state", default: "/var/lib/flotilla"),
            names: Names(namespace: try file.text("namespace", default: "flotilla")))
        worker.transport.slots = try file.number("tasks", default: 2, in: 1...256)
        worker.transport.heartbeat = try file.duration("heartbeat", default: worker.transport.heartbeat)
        worker.transport.leaseDuration = try file.duration("lease", default: worker.transport.leaseDuration)
        worker.rateLimit = try file.bytes("rate").map { RateLimit(bytesPerSecond: $0) }
        worker.vsphere = VSphereSources(try file.sections("vsphere").map(VSphereSource.init(section:)))
        drain = try file.duration("drain", default: .seconds(300))
        // A misspelt heartbeat is not one of 10 s.
        guard worker.transport.heartbeat * 3 <= worker.transport.leaseDuration else {
            throw file.problem("lease", "has to be at least three heartbeats")
        }
    }
}

extension VSphereSource {
    fileprivate static let settings = ["server", "password-file", "fingerprint", "ca", "host-rate", "datastore-rate"]
        .map { "vsphere.\($0)" }

    /// One server of the list `vsphere`.
    fileprivate init(section: ConfigurationSection) throws {
        let url = try VSphereURL(parsing: try section.text("server"))
        guard url.datacenter == nil, url.vm == nil else {
            throw section.problem("server", "has to be vsphere://USER@HOST and no more")
        }
        let passwordFile = try section.text("password-file")
        var trust = ServerTrust.system
        if section.has("fingerprint") {
            trust = .fingerprint(try CertificateFingerprint(try section.text("fingerprint"), .sha256))
            if section.has("ca") { throw section.problem("ca", "and fingerprint exclude each other") }
        } else if section.has("ca") {
            trust = .authorities(try section.text("ca"))
        }
        self.init(VIMServer(authority: url.authority, user: url.user, trust: trust, passwordFile: passwordFile))
        hostRate = try section.bytes("host-rate")
        datastoreRate = try section.bytes("datastore-rate")
    }
}

/// Where a member's own key and those it believes lie.
struct KeyFiles {
    var own: String
    var trusted: String

    fileprivate static let settings = ["keys.own", "keys.trusted"]

    init(_ file: ConfigurationSection) throws {
        let section = try file.section("keys")
        own = try section.text("own")
        trusted = try section.text("trusted")
    }

    func member(named name: String) throws -> FleetMember {
        FleetMember(name: name, key: try SigningKey(path: own), believes: try KeyRing(folder: trusted))
    }
}

extension AMQPConfiguration {
    fileprivate static let settings = [
        "addresses", "tls.ca", "tls.certificate", "tls.key", "password-file", "user", "virtual-host", "plaintext",
        "heartbeat",
    ].map { "broker.\($0)" }

    /// - Parameter name: the broker user unless another is named, and what the connections are called.
    init(_ section: ConfigurationSection, name: String) throws {
        var brokers: [Broker] = []
        for address in try section.texts("addresses") {
            guard let colon = address.lastIndex(of: ":"), colon != address.startIndex,
                let port = Int(address[address.index(after: colon)...])
            else { throw section.problem("addresses", "'\(address)' is not HOST:PORT") }
            brokers.append(Broker(host: String(address[..<colon]), port: port))
        }
        var tls: TLS?
        if section.has("tls") {
            let part = try section.section("tls")
            tls = TLS(authorities: try part.text("ca"))
            if part.has("certificate") || part.has("key") {
                tls?.certificate = try part.text("certificate")
                tls?.key = try part.text("key")
            }
        }
        let authentication: Authentication
        if section.has("password-file") {
            authentication = .plain(
                user: try section.text("user", default: name), passwordFile: try section.text("password-file"))
        } else {
            if section.has("user") {
                throw section.problem(
                    "user", "goes with password-file: a certificate names its user itself",
                    hint: "leave it away, or set password-file")
            }
            authentication = .external
        }
        self.init(brokers: brokers, tls: tls, authentication: authentication)
        virtualHost = try section.text("virtual-host", default: virtualHost)
        allowsPlaintext = try section.flag("plaintext", default: false)
        heartbeat = try section.duration("heartbeat", default: heartbeat)
        connectionName = "flotilla \(name)"
        try validate()
    }
}
