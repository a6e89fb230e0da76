import ArgumentParser
import HostKit
import Passthrough

struct GPUListCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list", abstract: "Shows this host's GPUs in their IOMMU groups, and who uses them.",
        discussion: """
            A group goes to one virtual machine as a whole; bridges and functions without a driver in it are no obstacle. \
            Names come from pci.ids (Debian: package pci.ids). MIG is asked of nvidia-smi where NVIDIA's driver runs.

            To look at a host from elsewhere, record its device tree there, without the devices' own memory:

              tar -C /sys --exclude='resource[0-9]*' --exclude=rom --exclude=vpd --ignore-failed-read -czf tree.tgz \
                  bus/pci class/iommu kernel/iommu_groups devices/pci*

            and unpack it into a folder for --sysfs-root.
            """)

    @OptionGroup var host: GPUHost
    @Flag(help: "Also every other device that could be handed over.") var all = false
    @Flag(help: "Print JSON.") var json = false

    func run() async throws {
        let listing = try await blocking("gpu list") { [host, all] in
            var tree = try host.observe()
            if host.isLive { readMIG(&tree) }
            return GPUListing(tree, all: all)
        }
        if host.users == .own {
            Console.complain("warning: only root sees which processes have devices and for whom they are reserved")
        }
        if json { return Console.line(try jsonLine(listing)) }
        for line in listing.lines { Console.line(line) }
    }
}
