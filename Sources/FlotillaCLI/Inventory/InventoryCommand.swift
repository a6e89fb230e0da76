import ArgumentParser
import Export
import FlotillaProtocol
import FoundationEssentials
import HostKit
import MigrationModel
import SwiftProtobuf
import VSphere

struct InventoryCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "inventory", abstract: "Lists a source's VMs, hosts, clusters, datastores, networks and GPUs.",
        discussion: """
            SOURCE is vsphere://USER@HOST[/DATACENTER] (a vCenter or an ESXi host), ova:PATH, ovf:PATH or vmx:PATH. It \
            is only read. A user may hold '@': vsphere://administrator@vsphere.local@vcenter.example/DC1.

            --json prints one object: source; of a vSphere server also about, datacenters, clusters, hosts (with \
            their gpus and vGPU profiles), datastores, networks; and vms, each a migration manifest, whose findings \
            say what stands in the way of moving it.
            """)

    @Argument(help: ArgumentHelp("What to list.", valueName: "source")) var source: String
    @OptionGroup var access: VSphereAccess
    @Option(name: .customLong("vm"), help: "Only this VM, by name or managed object id.") var vm: String?
    @Flag(help: "Print JSON.") var json = false

    func validate() throws {
        try validateSource(source)
        try validateVM(vm, of: source)
    }

    func run() async throws {
        let report: any InventoryReport = json ? JSONInventory(source) : InventoryTables()
        guard VSphereURL.isOne(source) else {
            let url = try SourceURL(parsing: source)
            let manifest = try await interruptible("inventory") { stop in
                try captureManifest(from: url, vmName: vm, stop: stop)
            }
            try report.add(manifest)
            return try report.finish()
        }
        var parsed = try VSphereURL(parsing: source)
        if let vm { parsed.vm = vm }
        let url = parsed
        let server = try access.server(of: url, tellsRetries: true)
        try await interruptible("inventory") { stop in
            let client = try VIMClient(server, stop: stop)
            defer { client.close() }
            let inventory = try Inventory(client, url, stop: stop)
            try report.begin(inventory.infrastructure)
            if url.vm != nil {
                try report.add(try inventory.virtualMachine(stop: stop))
            } else {
                try inventory.virtualMachines(stop: stop) { try report.add($0) }
            }
            try report.finish()
        }
    }
}
