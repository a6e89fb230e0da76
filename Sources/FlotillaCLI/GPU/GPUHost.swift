import ArgumentParser
import Deploy
import Glibc
import HostKit
import MigrationModel
import Passthrough

/// The device tree that a command looks at: this host's, or a recorded one.
struct GPUHost: ParsableArguments {
    @Option(help: ArgumentHelp("Look at a recorded device tree instead of this host's.", valueName: "folder"))
    var sysfsRoot: String?

    @Option(
        help: ArgumentHelp(
            "libvirt's URI, whose domains own devices; 'none' does not ask (default: qemu:///system where libvirt runs).",
            valueName: "uri"))
    var libvirt: String?

    var sysfs: Sysfs { Sysfs(folder: sysfsRoot ?? "/sys") }

    /// Of this running host, not of a recorded one.
    var isLive: Bool { sysfsRoot == nil }

    var users: KnownUsers { !isLive ? .recorded : geteuid() == 0 ? .all : .own }

    /// Blocks: asks libvirt, looks at every process. Of a recorded tree only what is in it is known.
    func observe() throws -> DeviceTree {
        try sysfs.requireDevices()
        guard isLive else { return try DeviceTree(sysfs) }
        let around = try Surroundings(domains: domains(), ledger: GPULedger())
        return try DeviceTree(sysfs, around: around, modules: "/lib/modules/\(kernelRelease())")
    }

    /// Everybody's devices by libvirt. Where no libvirt runs nobody has any, nor is a recorded tree's asked; where one runs
    /// and does not answer, nothing may be assumed. Blocks.
    func domains() throws -> [GPULedger.Domain] {
        if libvirt == "none" || !isLive { return [] }
        let sockets = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"]
        guard libvirt != nil || sockets.contains(where: Files.exists) else { return [] }
        do {
            return try LibvirtConnection(uri: libvirt ?? "qemu:///system").deviceOwners(sysfs: sysfs)
        } catch let error as MigrationError {
            throw MigrationError(
                error.code, "which domains own which devices is not known: \(error.message)",
                hint: "start libvirt, name it with --libvirt, or say --libvirt none", cause: error.cause)
        }
    }
}

extension Sysfs {
    /// Throws when this is no device tree, or one that can't be read.
    func requireDevices() throws {
        let devices = path("bus/pci/devices")
        guard !Files.isDirectory(devices) || (try? Files.list(devices)) != nil else {
            throw MigrationError(
                .permissionDenied, "\(devices) can't be read", hint: "run it with sudo, or make the folder readable")
        }
        guard Files.isDirectory(devices) else {
            throw MigrationError(
                .notFound, "\(root) holds no bus/pci/devices",
                hint: root == Sysfs().root
                    ? "this machine has no PCI bus, or sysfs is not mounted" : "name the folder that stands for /sys")
        }
    }
}

extension VgpuHost {
    /// A recorded tree, of which this host's programs and notes know nothing.
    init(recorded sysfs: Sysfs) {
        self.init(sysfs: sysfs, tools: VgpuTools(folders: []), folder: sysfs.path("flotilla"))
    }
}

extension Sysfs {
    /// As a person writes it, with a slash at its end or without.
    init(folder: String) {
        var root = folder
        while root.count > 1 && root.hasSuffix("/") { root.removeLast() }
        self.init(root: root)
    }
}

extension PciAddress: ExpressibleByArgument {
    package init?(argument: String) {
        // lspci leaves the domain out.
        let text = argument.lowercased()
        self.init(text.filter { $0 == ":" }.count == 1 ? "0000:\(text)" : text)
    }
}

/// Runs a handover; one that is refused has changed nothing and ends with the exit code that says so.
func refusable<Value: Sendable>(_ body: @escaping @Sendable () throws -> Value) async throws -> Value {
    do {
        return try await blocking("gpu", body)
    } catch let error as MigrationError where error.code == .failedPrecondition {
        Console.complain("flotilla: refused, nothing was changed: \(error.message)")
        if let hint = error.hint { Console.complain("  \(hint)") }
        throw ExitCode(Exit.blocked.rawValue)
    }
}

/// As root; the kernel would refuse each write by itself, after some had been done, and what flotilla noted of this host's
/// devices is for root's eyes.
func requireRoot() throws {
    guard geteuid() == 0 else {
        throw MigrationError(
            .permissionDenied, "only root can change this host's devices, or read what flotilla noted of them",
            hint: "run it with sudo")
    }
}

/// What a dry run would write to sysfs.
func showWrites(_ writes: [SysfsWrite], _ sysfs: Sysfs, json: Bool, nothing: String) throws {
    if json {
        struct Write: Encodable {
            var attribute: String
            var text: String
        }
        return Console.line(
            try jsonLine(writes.map { Write(attribute: sysfs.path($0.attribute), text: $0.text) }))
    }
    if writes.isEmpty { Console.line(nothing) }
    for write in writes { Console.line(write.told(of: sysfs)) }
}
