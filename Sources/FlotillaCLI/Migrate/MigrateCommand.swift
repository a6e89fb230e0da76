import ArgumentParser
import Export
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Passthrough
import SwiftProtobuf

struct MigrateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "migrate",
        abstract: "Moves VMs to this host: export, convert and deploy in one process.",
        discussion: """
            SOURCE is ova:PATH, ovf:PATH or vmx:PATH. Sources are only read.

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

    @Option(help: "Format of the disks: qcow2 or raw.")
    var format: DiskImageFormat = .qcow2

    @Option(
        name: .customLong("network"),
        help: ArgumentHelp(
            "Where a source network's NICs go: SRC=bridge:BR or SRC=network:NET. Repeatable.", valueName: "mapping"))
    var networks: [NetworkArgument] = []

    @Option(help: "GPUs and other passthrough devices: require (all or nothing) or drop.")
    var gpu: GPUPolicyArgument = .require

    @Option(help: "Bus of the disks: virtio, scsi or sata (default: what suits the guest).")
    var diskBus: DiskBusArgument?

    @Option(help: "Name of the domain, when one VM is migrated (default: the VM's name).")
    var name: String?

    @Flag(help: "Let libvirt's domain have a new UUID instead of the source's.")
    var newUUID = false

    @Flag(help: "Start the VMs.")
    var start = false

    @Option(help: ArgumentHelp("Proof that a started VM runs: console=REGEX, agent or none.", valueName: "check"))
    var verify: VerifyArgument = .none

    @Option(help: ArgumentHelp("Seconds to wait for that proof.", valueName: "seconds"))
    var verifyTimeout: UInt32 = 300

    @Option(help: ArgumentHelp("Read all disks together no faster than this per second; K, M, G.", valueName: "bytes"))
    var rate: ByteCountArgument?

    @Flag(help: "Print one JSON object per event.")
    var json = false

    @Flag(help: "Change nothing; say what would be done, with the domain's XML.")
    var dryRun = false

    @Flag(name: .shortAndLong, help: "Log what happens inside to standard error.")
    var verbose = false

    func validate() throws {
        if sources.isEmpty { throw ValidationError("Name at least one source, for example ova:web.ova") }
        if verify != .none && !start {
            throw ValidationError("--verify needs --start: there is nothing to watch otherwise")
        }
        if let name {
            guard isValidDomainName(name) else { throw ValidationError("'\(name)' can't be a domain's name") }
            if sources.count > 1 || vms.count > 1 { throw ValidationError("--name goes with one VM only") }
        }
        if vms.count > 1 && sources.count > 1 { throw ValidationError("Several --vm go with one source only") }
        for source in sources {
            do { _ = try SourceURL(parsing: source) } catch let error as MigrationError
                where error.code != .unimplemented
            {
                throw ValidationError(error.description)
            }
        }
    }

    func run() async throws {
        let requests = try requests()
        let run = MigrateRun(
            requests: requests, libvirtURI: host, pool: requests.first?.pool ?? pool,
            stateDirectory: try stateFolder(state),
            isDryRun: dryRun, output: OutputStyle(json: json), verbose: verbose, rate: rate?.bytes)
        let exit = try await run.run()
        if exit != .done { throw ExitCode(exit.rawValue) }
    }

    /// One migration per source and VM.
    private func requests() throws -> [SubmitMigrationRequest] {
        let pool = Files.isDirectory(pool) ? try Files.canonical(pool) : try absolute(pool)
        var options = DeployOptions()
        options.networks = networks.map(\.mapping)
        options.domainName = name ?? ""
        options.gpu = gpu.policy
        options.diskBus = diskBus?.bus ?? .unspecified
        options.keepUuid = !newUUID
        options.start = start
        options.verification = verify.verification
        options.verification.timeoutSeconds = verifyTimeout
        var requests: [SubmitMigrationRequest] = []
        for source in sources {
            let url = try SourceURL(parsing: source)
            for vm in vms.isEmpty ? [""] : vms {
                var request = SubmitMigrationRequest()
                // The same file is the same source, whatever folder the command is given in.
                let path = Files.exists(url.path) ? try Files.canonical(url.path) : url.path
                request.sourceURL = "\(url.kind.rawValue):\(path)"
                request.vmName = vm
                request.host = host
                request.pool = pool
                request.format = format.rawValue
                request.options = options
                request.dryRun = dryRun
                if !requests.contains(request) { requests.append(request) }
            }
        }
        return requests
    }
}
