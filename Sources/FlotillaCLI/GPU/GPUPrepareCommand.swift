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
            every file back to the byte, but not the boot entries of kernels that were removed since, and names those that \
            carry its words and are none of its own. What the host itself uses is refused, as `flotilla gpu bind` does: then it exits 3 and \
            nothing was changed.
            """)

    @Argument(help: ArgumentHelp("Functions to bind at boot.", valueName: "address")) var addresses: [PciAddress] = []
    @Flag(help: "Print what would be written and run, do nothing.") var dryRun = false
    @Flag(help: "Take everything back that earlier runs did.") var revert = false
    @Flag(name: .customLong("force-boot-vga"), help: "Also the display the host booted with.") var forceBootVGA = false
    @Flag(help: "Also a GPU that shows the kernel's console.") var forceConsole = false
    @Flag(help: "Also what processes and network interfaces that are up use.") var forceInUse = false
    @Option(
        help: ArgumentHelp(
            "Work on the files of another system below this folder; run no programs.", valueName: "folder"))
    var root: String?
    @Option(
        help: ArgumentHelp(
            "With --root: that system's device tree; /sys when it is of this machine.", valueName: "folder"))
    var sysfsRoot: String?

    func validate() throws {
        if revert && !addresses.isEmpty { throw ValidationError("--revert takes everything back, without addresses") }
        // One machine's devices say nothing of how another boots.
        if sysfsRoot != nil && root == nil {
            throw ValidationError("A recorded device tree says nothing of this host's files: add --root")
        }
        if root != nil && sysfsRoot == nil && !revert {
            throw ValidationError(
                "This host's devices say nothing of another system: add --sysfs-root (/sys when it is of this machine)")
        }
    }

    func run() async throws {
        let command = self
        if root == nil && !dryRun { try requireRoot() }
        try await refusable { try command.work() }
    }

    private var consent: Consent {
        var consent: Consent = []
        if forceConsole { consent.insert(.console) }
        if forceBootVGA { consent.insert(.bootVGA) }
        if forceInUse { consent.insert(.use) }
        return consent
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
        if revert { return try takeBack(host) }

        let sysfs = Sysfs(folder: sysfsRoot ?? "/sys")
        let isHere = sysfs.root == Sysfs().root
        let around = isHere ? Surroundings(proc: "/proc", sysfs: sysfs) : Surroundings()
        let tree = try DeviceTree(sysfs, around: around)
        let devices = try devicesToPrepare(addresses, in: tree, consent: consent)
        let cpuinfo = isHere ? try? Files.read("/proc/cpuinfo", limit: 1 << 24) : nil
        let setup = try HostSetup(
            root: folder, devices: devices, in: tree,
            amd: isAMD(sysfs, cpuinfo: cpuinfo.map { String(decoding: $0, as: UTF8.self) }))
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

    private func takeBack(_ host: PreparedHost) throws {
        let changes = try host.reverting()
        for change in changes { Console.out(change.diff) }
        for entry in try host.entriesOfOthers() {
            Console.line(
                "note: \(entry) has such words too, and not from here: take them out by hand if they are to go")
        }
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
}
