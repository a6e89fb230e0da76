import ArgumentParser
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

struct GPUProfilesCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "profiles", abstract: "vGPU profiles that can be made now, and the vGPUs flotilla made.",
        discussion: "Reads only, unless --enable, --disable or --mixed-sizes is given.")

    @OptionGroup var host: GPUHost

    @Option(
        help: "Turn on the virtual functions of this GPU. They are gone after a reboot or when its driver is reloaded.")
    var enable: PciAddress?

    @Option(help: "Turn them off again, if nothing uses them.")
    var disable: PciAddress?

    @Option(help: "Let vGPUs of several sizes live on this GPU, which may have none yet.")
    var mixedSizes: PciAddress?

    func run() async throws {
        let vgpus = VgpuHost(sysfs: host.sysfs)
        let (host, enable, disable, mixed) = (host, enable, disable, mixedSizes)
        let isChange = enable != nil || disable != nil || mixed != nil
        if isChange { try requireLive(host) }
        let (places, records) = try await refusable {
            if let enable { try vgpus.exclusively { try vgpus.enableVirtualFunctions(of: enable) } }
            if let disable {
                try vgpus.exclusively { try vgpus.disableVirtualFunctions(of: disable, in: host.observe()) }
            }
            if let mixed { try vgpus.allowMixedSizes(on: mixed) }
            return (vgpus.places(), try vgpus.records())
        }
        for gpu in [enable, disable].compactMap(\.self) {
            let functions = vgpus.virtualFunctions(of: gpu)
            Console.line("\(gpu): \(functions.isEmpty ? "no" : "\(functions.count)") virtual functions")
        }
        let rows = places.flatMap { place in
            place.types().map { type in
                [
                    "\(place.physical)", "\(place.function)", place.path.rawValue, type.name, type.id,
                    place.isOccupied ? "0" : "\(type.available)",
                ]
            }
        }
        if isChange && rows.isEmpty { return }
        guard !rows.isEmpty || !records.isEmpty else {
            throw MigrationError(
                .notFound, "no GPU of this host offers vGPUs now",
                hint: "flotilla gpu check ADDRESS --vgpu PROFILE says what is missing")
        }
        for line in table(["GPU", "function", "path", "profile", "type", "free"], rows) { Console.line(line) }
        guard host.isLive, !records.isEmpty else { return }
        Console.line("")
        let made = records.map { record in
            [
                record.profile, record.function, record.uuid ?? "-", record.device, "\(record.owner)",
                record.phase.rawValue,
            ]
        }
        for line in table(["vGPU", "function", "UUID", "device", "for", "state"], made) { Console.line(line) }
    }
}

struct GPUCreateCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "create", abstract: "Makes a vGPU for a domain, which stays over reboots.",
        discussion: "A migration makes its own. Again for the same domain and device: the same vGPU.")

    @Argument(help: "Profile in any spelling: A100-40C, grid_a100-40c, NVIDIA A100-40C, A100-1-5C.") var profile: String
    @Option(help: "The domain it is for.") var domain: String
    @Option(help: "Name of the device within the domain.") var device = "gpu0"
    @Option(help: "GPU to make it on (default: whichever has room).") var gpu: PciAddress?
    @Flag(help: "Print JSON.") var json = false

    func run() async throws {
        try requireRoot()
        guard isValidDomainName(domain) else { throw ValidationError("'\(domain)' can't be a domain's name") }
        let (profile, device, gpu) = (VgpuProfile(profile), device, gpu)
        let owner = GPUOwner(domain: domain, migration: "", fence: 0)
        let record = try await blocking("gpu") {
            try VgpuHost().create(profile, for: owner, device: device, on: gpu)
        }
        if json { return Console.line(try jsonLine(record)) }
        Console.line("\(record.profile) on \(record.function)\(record.uuid.map { ", UUID \($0)" } ?? "")")
    }
}

struct GPUDestroyCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "destroy", abstract: "Destroys vGPUs that were made for a domain, of a migration or not.")

    @Option(help: "The domain they were made for.") var domain: String
    @Option(help: "Only this device of it.") var device: String?

    func run() async throws {
        try requireRoot()
        let (domain, device) = (domain, device)
        let count = try await blocking("gpu") {
            let vgpus = VgpuHost()
            let records = try vgpus.records().filter {
                $0.owner.domain == domain && (device == nil || device == $0.device)
            }
            for record in records { try vgpus.destroy(of: record.owner, device: record.device) }
            return records.count
        }
        guard count > 0 else {
            throw MigrationError(
                .notFound, "flotilla made no vGPU for a domain \(domain)",
                hint: "flotilla gpu profiles lists those it made")
        }
        Console.line("destroyed \(count) vGPU\(count == 1 ? "" : "s") of domain \(domain)")
    }
}

struct GPURestoreCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "restore", abstract: "Makes again the vGPUs that a reboot took; run by flotilla-vgpu.service.")

    func run() async throws {
        try requireRoot()
        for record in try await blocking("gpu", { try VgpuHost().restore() }) {
            Console.line("\(record.profile) on \(record.function) for \(record.owner)")
        }
    }
}

private func requireLive(_ host: GPUHost) throws {
    guard host.isLive else { throw ValidationError("a recorded device tree can't be changed") }
    try requireRoot()
}
