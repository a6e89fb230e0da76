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
    @Flag(help: "Print JSON.") var json = false
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

    /// What was done, or of a dry run would be.
    private struct Report: Encodable {
        struct Change: Encodable {
            /// On the prepared system.
            let path: String
            /// Unified.
            let diff: String
        }

        let changes: [Change]
        var notes: [String] = []
        /// Programs with their arguments; of another system's files: for somebody to run there.
        var commands: [[String]] = []
        var needsReboot = false

        init(_ changes: [HostSetup.FileChange]) { self.changes = changes.map { Change(path: $0.path, diff: $0.diff) } }
    }

    private func work() throws {
        // Programs of another system are for somebody to run there.
        let host = root == nil ? PreparedHost(root: "") : PreparedHost(root: folder, run: nil)
        let (report, apply) = try revert ? takeBack(host) : prepare(host)
        if !json {
            for change in report.changes { Console.out(change.diff) }
            for note in report.notes { Console.line("note: \(note)") }
        }
        if !dryRun { try apply() }
        if json { return Console.line(try jsonLine(report)) }
        if report.changes.isEmpty && report.commands.isEmpty {
            Console.line(revert ? "nothing to take back" : "prepared: nothing to change")
        }
        if dryRun || root != nil {
            for command in report.commands {
                Console.line("\(dryRun ? "would run" : "to run there"): \(command.joined(separator: " "))")
            }
        }
        if report.needsReboot {
            Console.line("A reboot is needed before it takes effect\(revert ? "." : "; then: flotilla gpu list")")
        }
    }

    private func prepare(_ host: PreparedHost) throws -> (Report, apply: () throws -> Void) {
        let sysfs = Sysfs(folder: sysfsRoot ?? "/sys")
        try sysfs.requireDevices()
        let isHere = sysfs.root == Sysfs().root
        let around = isHere ? Surroundings(proc: "/proc", sysfs: sysfs) : Surroundings()
        let tree = try DeviceTree(sysfs, around: around)
        let devices = try devicesToPrepare(addresses, in: tree, consent: consent)
        let bytes = isHere ? try? Files.read("/proc/cpuinfo", limit: 1 << 24) : nil
        let cpuinfo = bytes.map { String(decoding: $0, as: UTF8.self) }
        let setup = try HostSetup(
            root: folder, devices: devices, in: tree,
            amd: isAMD(sysfs, cpuinfo: cpuinfo), arm: isARM(sysfs, cpuinfo: cpuinfo))
        var report = Report(setup.changes)
        report.notes = setup.notes
        if !isHere && !addresses.isEmpty {
            report.notes.append(
                "a recorded device tree does not tell which processes, domains or disks use devices: see what flotilla gpu "
                    + "check says on that host before you rely on it")
        }
        try show(unfinished: host.pending(), in: &report)
        report.commands += setup.commands.filter { !report.commands.contains($0) }
        let running = String(decoding: (try? Files.read("/proc/cmdline")) ?? [], as: UTF8.self)
        let isMet =
            setup.isMet(byRunning: running)
            && devices.allSatisfy { isVfio(driver: $0.function.driver) || setup.isBuiltIn($0.function.driver, tree) }
        report.needsReboot = root != nil || !report.changes.isEmpty || !report.commands.isEmpty || !isMet
        let stat = String(decoding: (try? Files.read("/proc/stat")) ?? [], as: UTF8.self)
        if root == nil, report.changes.isEmpty, !setup.isMet(byRunning: running), host.isStartedSince(stat) {
            report.notes.append(
                "this host was started since it was prepared, without \(setup.parameters.joined(separator: " ")): what "
                    + "it boots by is not what was written; compare /proc/cmdline with its boot loader's menu")
        }
        let isNothing = report.changes.isEmpty && report.commands.isEmpty
        return (report, { if !isNothing { try host.apply(setup) } })
    }

    private func show(unfinished commands: [[String]], in report: inout Report) {
        guard !commands.isEmpty else { return }
        let programs = commands.map { $0.joined(separator: " ") }.joined(separator: "; ")
        report.notes.append("an earlier run did not come to the end of what it had to run: once more: \(programs)")
        report.commands = commands
    }

    private func takeBack(_ host: PreparedHost) throws -> (Report, apply: () throws -> Void) {
        let changes = try host.reverting()
        // The same programs that carried it in carry it out.
        let commands = HostSetup.commands(root: folder, for: changes.map(\.path))
        var report = Report(changes)
        report.notes = try host.entriesOfOthers().map {
            "\($0) has such words too, and not from here: take them out by hand if they are to go"
        }
        report.notes += HostSetup.notes(root: folder, for: changes.map(\.path))
        try show(unfinished: host.pending(), in: &report)
        report.commands += commands.filter { !report.commands.contains($0) }
        report.needsReboot = !changes.isEmpty || !report.commands.isEmpty
        return (report, { try host.revert(commands: commands) })
    }
}
