import ArgumentParser
import Export
import FlotillaProtocol
import Glibc
import HostKit
import Logging
import MigrationModel
import Passthrough
import SwiftProtobuf
import VSphere
import Worker

struct MigrateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "migrate",
        abstract: "Moves VMs to this host: export, convert and deploy in one process.",
        discussion: """
            SOURCE is ova:PATH, ovf:PATH, vmx:PATH, manifest:PATH or vsphere://USER@HOST[/DATACENTER] with --vm. Sources are \
            only read; of a vSphere VM the disks come straight from the server, and nothing is staged.

            Run the same command again after an interruption, a crash or a full disk: it continues, disks from their \
            last checkpoint. Run it again after it is done: it checks that source, disks and domain are as they were \
            and changes nothing.

              flotilla migrate ova:web.ova --pool /var/lib/libvirt/images \\
                --network 'VM Network=bridge:br0' --start --verify 'console=login:'
            """)

    @Argument(help: ArgumentHelp("What to migrate.", valueName: "source"))
    var sources: [String]

    @Option(name: .customLong("vm"), help: "Name of a VM within a source that holds several. Repeatable.")
    var vms: [String] = []

    @Option(help: ArgumentHelp("libvirt's URI on this host.", valueName: "uri"))
    var host = "qemu:///system"

    @Option(help: ArgumentHelp("Folder the disks go to.", valueName: "dir"), completion: .directory)
    var pool: String

    @Option(
        help: ArgumentHelp(
            "Folder for the migration's records (default: /var/lib/flotilla, or ~/.local/state/flotilla).",
            valueName: "dir"), completion: .directory)
    var state: String?

    @OptionGroup var options: MigrationOptions
    @OptionGroup var access: VSphereAccess
    @OptionGroup var transfer: VSphereTransfer

    @Option(help: "Name of the domain, when one VM is migrated (default: the VM's name).")
    var name: String?

    @Option(help: ArgumentHelp("Read all disks together no faster than this per second; K, M, G.", valueName: "bytes"))
    var rate: ByteCountArgument?

    @Flag(
        help: "Take back what this command did: undefine the domain and return its GPUs. Disks and source stay.")
    var rollback = false

    @Flag(help: "With --rollback: cut the power of a guest that runs.")
    var force = false

    @Flag(help: "Print one JSON object per event.")
    var json = false

    @Flag(name: .shortAndLong, help: "Log what happens inside to standard error.")
    var verbose = false

    func validate() throws {
        if force && !rollback { throw ValidationError("--force goes with --rollback only") }
        if sources.isEmpty { throw ValidationError("Name at least one source, for example ova:web.ova") }
        if let name {
            guard isValidDomainName(name) else { throw ValidationError("'\(name)' can't be a domain's name") }
            if sources.count > 1 || vms.count > 1 { throw ValidationError("--name goes with one VM only") }
        }
        if vms.count > 1 && sources.count > 1 { throw ValidationError("Several --vm go with one source only") }
        for source in sources {
            try validateSource(source)
            for vm in vms { try validateVM(vm, of: source) }
            if VSphereURL.isOne(source), vms.isEmpty, try VSphereURL(parsing: source).vm == nil {
                throw ValidationError("Name the VM of \(source) with --vm")
            }
        }
    }

    func run() async throws {
        let requests = try requests()
        if rollback { return try await takeBack(requests) }
        var servers: [VSphereSource] = []
        for source in sources where VSphereURL.isOne(source) {
            let url = try VSphereURL(parsing: source)
            if servers.contains(where: { $0.server.authority == url.authority && $0.server.user == url.user }) {
                continue
            }
            servers.append(VSphereSource(try access.server(of: url)))
        }
        let run = MigrateRun(
            requests: requests, libvirtURI: host, pool: requests.first?.pool ?? pool,
            stateDirectory: try stateFolder(state),
            isDryRun: options.dryRun, output: OutputStyle(json: json), verbose: verbose, rate: rate?.bytes,
            vsphere: servers)
        let exit = try await run.run()
        if exit != .done { throw ExitCode(exit.rawValue) }
    }

    private func takeBack(_ requests: [SubmitMigrationRequest]) async throws {
        var logger = Logger(label: "flotilla") { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = verbose ? .debug : .error
        var fleet = EmbeddedFleet(
            libvirtURI: host, pool: requests.first?.pool ?? pool, stateDirectory: try stateFolder(state), logger: logger
        )
        fleet.recoversDevices = !options.dryRun
        let how = RollbackOptions.of(dryRun: options.dryRun, force: force)
        let run = RollbackRun(requests: requests, fleet: fleet, options: how)
        try await showRollback(how, json: json) { try await run.run($0) }
    }

    /// One migration per source and VM.
    private func requests() throws -> [SubmitMigrationRequest] {
        let pool = Files.isDirectory(pool) ? try Files.canonical(pool) : try absolute(pool)
        var requests: [SubmitMigrationRequest] = []
        for source in sources {
            let (text, named) = try canonical(source)
            for vm in vms.isEmpty ? [named] : vms {
                var request = SubmitMigrationRequest()
                request.sourceURL = text
                request.vmName = vm
                request.host = host
                request.pool = pool
                request.options.domainName = name ?? ""
                options.apply(to: &request)
                if !requests.contains(request) { requests.append(request) }
            }
        }
        if !rollback { try requireDistinctDomains(requests) }
        return requests
    }

    /// Two VMs that would become one domain: told before a disk of either is converted.
    private func requireDistinctDomains(_ requests: [SubmitMigrationRequest]) throws {
        guard requests.count > 1 else { return }
        var known: [String: String] = [:]
        for request in requests {
            var vm = request.vmName
            if vm.isEmpty, !VSphereURL.isOne(request.sourceURL) {
                // What can't be read is told by its migration.
                let manifest = try? captureManifest(
                    from: SourceURL(parsing: request.sourceURL), vmName: nil, stop: StopFlag())
                vm = manifest?.vm.name ?? ""
            }
            guard !vm.isEmpty else { continue }
            let domain = domainName(for: vm)
            if let other = known.updateValue(vm, forKey: domain) {
                throw MigrationError(
                    .invalidArgument,
                    "VM '\(other.printable)' and VM '\(vm.printable)' would both become the domain \(domain)",
                    hint: "migrate one of them by itself, with --name")
            }
        }
    }

    /// The same source has the same text, whatever folder the command is given in; and the VM it names itself.
    private func canonical(_ source: String) throws -> (String, vm: String) {
        guard VSphereURL.isOne(source) else {
            let url = try SourceURL(parsing: source)
            let path = Files.exists(url.path) ? try Files.canonical(url.path) : url.path
            return ("\(url.kind.rawValue):\(path)", "")
        }
        var url = try VSphereURL(parsing: source)
        let vm = url.vm ?? ""
        url.vm = nil
        try transfer.apply(to: &url)
        return (url.description, vm)
    }
}
