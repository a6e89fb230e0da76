import ArgumentParser
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

struct GPUPrepareCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "prepare", abstract: "Makes this host boot ready for passthrough: IOMMU on, vfio-pci loaded.",
        discussion: """
            With addresses, those functions and what goes with them wait at vfio-pci from boot on, chosen by address, so that \
            another card of the same kind stays with the host. Knows GRUB, Boot Loader Specification entries, systemd-boot, \
            initramfs-tools and dracut. Prints the difference of every file. Takes effect with the next boot; --revert brings \
            every file back to the byte.
            """)

    @Argument(help: ArgumentHelp("Functions to bind at boot.", valueName: "address")) var addresses: [PciAddress] = []
    @Flag(help: "Print what would be written and run, do nothing.") var dryRun = false
    @Flag(help: "Take everything back that earlier runs did.") var revert = false
    @Flag(name: .customLong("force-boot-vga"), help: "Also the display the host booted with.") var forceBootVGA = false
    @Option(
        help: ArgumentHelp(
            "Work on the files of another system below this folder; run no programs.", valueName: "folder"))
    var root: String?
    @Option(help: ArgumentHelp("Look at a recorded device tree instead of this host's.", valueName: "folder"))
    var sysfsRoot: String?

    func validate() throws {
        if revert && !addresses.isEmpty { throw ValidationError("--revert takes everything back, without addresses") }
        if sysfsRoot != nil && root == nil && !dryRun {
            throw ValidationError("A recorded device tree says nothing of this host: add --root or --dry-run")
        }
    }

    func run() async throws {
        let command = self
        if root == nil && !dryRun { try requireRoot() }
        try await refusable { try command.work() }
    }

    private var folder: String {
        var folder = root ?? ""
        while folder.hasSuffix("/") { folder.removeLast() }
        return folder
    }

    private func work() throws {
        let isOther = root != nil
        let host =
            isOther
            ? PreparedHost(root: folder) { Console.line("to run there: \($0.joined(separator: " "))") }
            : PreparedHost(root: "")
        let sysfs = Sysfs(folder: sysfsRoot ?? "/sys")
        if revert { return try takeBack(host, sysfs) }

        let tree = try DeviceTree(sysfs)
        let devices = try chosenDevices(tree)
        let setup = try HostSetup(root: folder, devices: devices, in: tree, amd: isAMD(sysfs))
        let pending = try host.pending().filter { !setup.commands.contains($0) }
        for change in setup.changes { Console.out(change.diff) }
        for note in setup.notes { Console.line("note: \(note)") }
        if setup.changes.isEmpty && pending.isEmpty {
            Console.line("prepared: nothing to change")
        } else if dryRun {
            for command in pending + setup.commands { Console.line("would run: \(command.joined(separator: " "))") }
        } else {
            try host.apply(setup)
        }
        let running = ((try? Files.read("/proc/cmdline")) ?? []).split { $0 == 0x20 || $0 == 0x0a }.map {
            String(decoding: $0, as: UTF8.self)
        }
        if isOther || !setup.changes.isEmpty || !setup.parameters.allSatisfy(running.contains) {
            Console.line("A reboot is needed before it takes effect; then: flotilla gpu list")
        }
    }

    private func takeBack(_ host: PreparedHost, _ sysfs: Sysfs) throws {
        let changes = try host.reverting()
        for change in changes { Console.out(change.diff) }
        // The same programs that carried it in carry it out.
        let commands = HostSetup.commands(root: folder, for: changes.map(\.path))
        if changes.isEmpty { Console.line("nothing to take back") }
        if dryRun {
            for command in commands { Console.line("would run: \(command.joined(separator: " "))") }
            return
        }
        try host.revert(commands: commands)
        if !changes.isEmpty { Console.line("A reboot is needed before it takes effect.") }
    }

    private func chosenDevices(_ tree: DeviceTree) throws -> [DeviceFunction] {
        var devices: [PciAddress: DeviceFunction] = [:]
        for address in addresses {
            let together = tree.together(with: address)
            guard !together.isEmpty else {
                throw MigrationError(
                    .failedPrecondition, "this host has no PCI function \(address)",
                    hint: "flotilla gpu list --all shows those it has")
            }
            for device in together {
                if device.function.bridge {
                    throw MigrationError(
                        .failedPrecondition, "\(device.function.text) is a bridge, which is never handed over",
                        hint: "name another device")
                }
                if device.function.bootVga && !forceBootVGA {
                    throw MigrationError(
                        .failedPrecondition, "\(device.function.text) is the display the host booted with (boot_vga)",
                        hint: "make another adapter the primary display, or agree with --force-boot-vga")
                }
                devices[device.address] = device
            }
        }
        return devices.values.sorted { $0.address < $1.address }
    }

    /// The root complex's maker, else the CPU's.
    private func isAMD(_ sysfs: Sysfs) -> Bool {
        switch sysfs.number("bus/pci/devices/0000:00:00.0/vendor") {
        case 0x1022: return true
        case 0x8086: return false
        default:
            let info = (try? Files.read("/proc/cpuinfo")) ?? []
            return String(decoding: info.prefix(65_536), as: UTF8.self).contains("AuthenticAMD")
        }
    }
}
