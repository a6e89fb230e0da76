import ArgumentParser
import Assessment
import Deploy
import Export
import FlotillaProtocol
import FoundationEssentials
import GRPCCore
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf

struct AssessCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "assess", abstract: "Says which VMs can be moved, and for the others why not and what to do.",
        discussion: """
            SOURCE is vsphere://USER@HOST[/DATACENTER], ova:PATH, ovf:PATH, vmx:PATH or manifest:PATH, the last also a \
            folder of manifests. Nothing is \
            changed. Judged are the sources alone, or with --hosts, --fleet or --this-host whether one of those hosts \
            takes each VM and its GPUs. Exits 0 whatever is found; with --strict 3 if something is blocked.

              flotilla assess manifest:inventory/ --hosts profiles/ --network 'VM Network=bridge:br0' --html report.html
            """)

    @Argument(help: ArgumentHelp("What to assess.", valueName: "source")) var sources: [String]
    @OptionGroup var access: VSphereAccess
    @OptionGroup var transfer: VSphereTransfer
    @Option(name: .customLong("vm"), help: "Name of the VM within a source that holds several.") var vm: String?

    @Option(
        help: ArgumentHelp("Profiles of target hosts: a file, or a folder of them. Repeatable.", valueName: "path"),
        completion: .file())
    var hosts: [String] = []
    @Flag(help: "Judge for the hosts of the coordinator's fleet.") var fleet = false
    @OptionGroup var api: FleetOptions
    @Flag(help: "Judge for this host.") var thisHost = false
    @Option(help: ArgumentHelp("libvirt's URI on this host, with --this-host.", valueName: "uri"))
    var libvirt = "qemu:///system"
    @Option(
        help: ArgumentHelp(
            "Pool the disks go to (default: each host's largest); with --this-host a folder.", valueName: "name"))
    var pool: String?

    @Option(help: "Format of the disks: qcow2 or raw.") var format: DiskImageFormat = .qcow2
    @Option(
        name: .customLong("network"),
        help: ArgumentHelp("Where a source network's NICs go: SRC=bridge:BR or SRC=network:NET.", valueName: "mapping"))
    var networks: [NetworkArgument] = []
    @OptionGroup var devices: DeviceOptions

    @Flag(help: "Print JSON.") var json = false
    @Option(help: ArgumentHelp("Write a page for a browser as well.", valueName: "file"), completion: .file())
    var html: String?
    @Flag(help: "Exit 3 if a VM is blocked.") var strict = false

    func validate() throws {
        if sources.isEmpty { throw ValidationError("Name at least one source, for example vmx:web/web.vmx") }
        if vm != nil && sources.count > 1 { throw ValidationError("--vm goes with one source only") }
        for source in sources { try validateVM(vm, of: source) }
    }

    func run() async throws {
        let page = try html.map(absolute)
        if let page { try requireRoom(forFile: page) }
        var options = DeployOptions()
        options.networks = networks.map(\.mapping)
        devices.apply(to: &options)
        let profiles = try await profiles()
        let pool = thisHost ? try pool.map(absolute) : pool
        let (sources, vm, format) = (try sources.map { try AssessSource($0, access, transfer) }, vm, format.rawValue)
        let (assessment, failures) = try await interruptible("assess") { [options] stop in
            var assessment = Assessment(hosts: profiles, options: options, pool: pool, format: format)
            var failures: [MigrationError] = []
            for source in sources {
                do {
                    var found: [(Manifest, String)] = []
                    var refused: [(String, MigrationError)] = []
                    try source.capture(vmName: vm, stop: stop) {
                        found.append(($0, $1))
                    } refused: {
                        refused.append(($0, $1))
                    }
                    for (manifest, name) in found { assessment.add(manifest, source: name) }
                    for (name, error) in refused {
                        assessment.add(unreadable: name, message: error.message, remedy: error.hint ?? "")
                    }
                } catch let error as MigrationError where error.code != .cancelled {
                    failures.append(error)
                }
            }
            return (assessment, failures)
        }
        // Nothing takes the place of an earlier page when no source could be read.
        if let page, failures.isEmpty || !assessment.vms.isEmpty { try write(assessment, to: page) }
        if json {
            Console.line(try jsonLine(assessment))
        } else {
            for line in AssessmentView(assessment).lines { Console.line(line) }
        }
        for error in failures {
            Console.complain("flotilla: error: \(error.message)")
            if let hint = error.hint { Console.complain("  \(hint)") }
        }
        if !failures.isEmpty { throw ExitCode(Exit.failed.rawValue) }
        if strict && assessment.summary.blocked > 0 { throw ExitCode(Exit.blocked.rawValue) }
    }

    private func write(_ assessment: Assessment, to path: String) throws {
        let now = Date.now.formatted(.iso8601.year().month().day().time(includingFractionalSeconds: false))
        let page = try Page(assessment, title: "Migration assessment", date: "\(now) UTC").html()
        try Files.writeAtomically(Array(page.utf8), to: path, mode: 0o644)
    }

    /// Said before hours of reading, not after.
    private func requireRoom(forFile path: String) throws {
        let folder = Files.parent(of: path)
        guard Files.isDirectory(folder), !Files.isDirectory(path), Glibc.access(folder, W_OK) == 0 else {
            throw MigrationError(
                .invalidArgument, "--html \(path.printable): the page can't be written there",
                hint: "name a file in a folder that is there and that you may write to")
        }
    }

    private func profiles() async throws -> [HostProfile] {
        var found = try hosts.flatMap(hostProfiles(in:))
        if fleet { found += try await api.connect { try await $0.listHosts(.init()) }.hosts.map(\.profile) }
        if thisHost {
            let (uri, pools) = (
                libvirt, try pool.map { [PoolFolder(name: try absolute($0), path: try absolute($0))] } ?? []
            )
            found.append(
                try await blocking("host") {
                    try hostProfile(name: "this host", connection: try LibvirtConnection(uri: uri), pools: pools)
                })
        }
        return found
    }
}
