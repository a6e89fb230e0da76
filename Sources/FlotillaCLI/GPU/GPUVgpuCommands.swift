import ArgumentParser
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

struct GPUProfilesCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "profiles", abstract: "vGPU profiles that can be made now, and the vGPUs flotilla made.",
        discussion: """
            Reads only, unless an option says to change something. Tested on trees made from NVIDIA's documented \
            layout with stand-ins for its programs, never on an NVIDIA card: look at --dry-run first.
            """)

    @OptionGroup var host: GPUHost

    @Option(
        help: "Turn on the virtual functions of this GPU. They are gone after a reboot or when its driver is reloaded.")
    var enable: PciAddress?

    @Option(help: "Turn them off again, if nothing uses them.")
    var disable: PciAddress?

    @Option(help: "Let vGPUs of several sizes live on this GPU, also after a reboot; it may have none yet.")
    var mixedSizes: PciAddress?

    @Option(help: "Take --mixed-sizes back; the GPU may have no vGPU.")
    var equalSizes: PciAddress?

    @Option(help: "Put this GPU, which nothing may use, in MIG mode; the driver resets it.")
    var enableMig: PciAddress?

    @Option(help: "Take --enable-mig back; the GPU may have no instance.")
    var disableMig: PciAddress?

    @Flag(help: "Print every write and program of an option that changes something, do none.") var dryRun = false

    private var isChange: Bool {
        ![enable, disable, mixedSizes, equalSizes, enableMig, disableMig].allSatisfy { $0 == nil }
    }

    func validate() throws {
        if dryRun && !isChange {
            throw ValidationError(
                "--dry-run goes with an option that changes something, such as --enable: else nothing is changed")
        }
        if (enableMig != nil || disableMig != nil) && !host.isLive {
            throw ValidationError("MIG mode is asked of this host's nvidia-smi: a recorded device tree has none")
        }
        if isChange && !dryRun && !host.isLive {
            throw ValidationError("A recorded device tree can't be changed: add --dry-run")
        }
    }

    func run() async throws {
        let vgpus = host.isLive ? VgpuHost() : VgpuHost(recorded: host.sysfs)
        let (host, enable, disable, isChange) = (host, enable, disable, isChange)
        let asked: [(PciAddress?, VgpuHost.Setting)] = [
            (enableMig, .mig(true)), (disableMig, .mig(false)), (enable, .virtualFunctions(true)),
            (disable, .virtualFunctions(false)), (mixedSizes, .mixedSizes(true)), (equalSizes, .mixedSizes(false)),
        ]
        let settings = asked.compactMap { gpu, setting in gpu.map { (gpu: $0, setting: setting) } }
        if dryRun {
            let plans = try await refusable {
                try settings.map { try vgpus.plan($0.setting, of: $0.gpu, observe: host.observe) }
            }
            return plans.forEach { show($0, vgpus, nothing: "so already: nothing to do") }
        }
        if isChange { try requireRoot() }
        let (places, records, migs) = try await refusable {
            try vgpus.set(settings, observe: host.observe)
            let places = vgpus.places()
            let migs = host.isLive ? vgpus.migs(of: Array(Set(places.map(\.physical)))).filter(\.value.enabled) : [:]
            return (places, try vgpus.records(), migs)
        }
        for gpu in [enable, disable].compactMap(\.self) {
            let functions = vgpus.virtualFunctions(of: gpu)
            let total = vgpus.totalVirtualFunctions(of: gpu)
            let count =
                functions.isEmpty
                ? "no" : functions.count < total ? "\(functions.count) of \(total)" : "\(functions.count)"
            Console.line("\(gpu): \(count) virtual functions")
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
        guard !rows.isEmpty || !records.isEmpty || !migs.isEmpty else {
            throw MigrationError(
                .notFound, "no GPU of this host offers vGPUs now",
                hint: "flotilla gpu check ADDRESS --vgpu PROFILE says what is missing")
        }
        for line in table(["GPU", "function", "path", "profile", "type", "free"], rows) { Console.line(line) }
        let instances = migs.sorted { $0.key < $1.key }.flatMap { gpu, mig in
            mig.profiles.map { profile in
                let there = mig.instances.count { $0.name == profile.name }
                return ["\(gpu)", profile.name, "\(there)", "\(mig.room(for: profile.name))"]
            }
        }
        if !instances.isEmpty {
            Console.line("")
            for line in table(["GPU", "instance", "there", "more"], instances) { Console.line(line) }
        }
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
        discussion: """
            A migration makes its own. Again for the same domain and device: the same vGPU. None is made on what another \
            domain's definition names, and none that is there is replaced. A MIG-backed one gets its GPU instance made where \
            none has room. Tested on trees made from NVIDIA's documented layout with stand-ins for its programs, and on the \
            kernel's own sample of a mediated device, never on an NVIDIA card.
            """)

    @OptionGroup var host: GPUHost
    @Argument(help: "Profile in any spelling: A100-40C, grid_a100-40c, NVIDIA A100-40C, A100-1-5C.") var profile: String
    @Option(help: "The domain it is for.") var domain: String
    @Option(help: "Name of the device within the domain.") var device = "gpu0"
    @Option(help: "GPU to make it on (default: whichever has room).") var gpu: PciAddress?
    @Flag(help: "Print every write and program, do none.") var dryRun = false
    @Flag(help: "Print JSON.") var json = false

    func validate() throws {
        guard isValidDomainName(domain) else { throw ValidationError("'\(domain)' can't be a domain's name") }
        if !host.isLive && !dryRun {
            throw ValidationError("A recorded device tree can't be changed: add --dry-run")
        }
    }

    func run() async throws {
        let (host, profile, device, gpu) = (host, VgpuProfile(profile), device, gpu)
        let owner = GPUOwner(domain: domain, migration: "", fence: 0)
        if dryRun {
            let vgpus = host.isLive ? VgpuHost() : VgpuHost(recorded: host.sysfs)
            if host.isLive { try requireRoot() }
            let plan = try await refusable {
                let others = try functionsOfOthers(host.domains(), than: owner.domain, on: gpu)
                return try vgpus.plan(create: profile, for: owner, device: device, on: gpu, besides: others)
            }
            return show(plan, vgpus, nothing: "there already: nothing to do")
        }
        try requireRoot()
        let others = try await refusable { try functionsOfOthers(host.domains(), than: owner.domain, on: gpu) }
        let record = try await blocking("gpu") {
            try VgpuHost().create(profile, for: owner, device: device, on: gpu, besides: others)
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
    @Flag(help: "Print every write and program, do none.") var dryRun = false

    func run() async throws {
        try requireRoot()
        let (domain, device, dryRun) = (domain, device, dryRun)
        let vgpus = VgpuHost()
        let (records, unfinished) = try await blocking("gpu") {
            let records =
                try dryRun
                ? vgpus.records(ofDomain: domain, device: device) : vgpus.destroy(ofDomain: domain, device: device)
            return (
                records,
                try dryRun ? vgpus.unfinished(ofDomain: domain) : vgpus.takeBackUnfinished(ofDomain: domain)
            )
        }
        guard !records.isEmpty || !unfinished.isEmpty else {
            throw MigrationError(
                .notFound, "flotilla made no vGPU \(device.map { "\($0) " } ?? "")for a domain \(domain)",
                hint: "flotilla gpu profiles lists those it made")
        }
        for what in unfinished { Console.line("\(dryRun ? "would take back" : "took back"): \(what)") }
        guard !records.isEmpty else { return }
        if dryRun { return show(try vgpus.plan(destroy: records), vgpus, nothing: "gone already: nothing to do") }
        Console.line("destroyed \(records.count) vGPU\(records.count == 1 ? "" : "s") of domain \(domain)")
    }
}

struct GPURestoreCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "restore", abstract: "Makes again the vGPUs that a reboot took; run by flotilla-vgpu.service.")

    @Flag(help: "Print every write and program, do none.") var dryRun = false

    func run() async throws {
        try requireRoot()
        if dryRun {
            let vgpus = VgpuHost()
            let plan = try await blocking("gpu") { try vgpus.restorePlan() }
            return show(plan, vgpus, nothing: "all there: nothing to do")
        }
        for record in try await blocking("gpu", { try VgpuHost().restore() }) {
            Console.line("\(record.profile) on \(record.function) for \(record.owner)")
        }
    }
}

private func show(_ plan: VgpuHost.Plan, _ vgpus: VgpuHost, nothing: String) {
    if plan.steps.isEmpty && plan.notes.isEmpty { Console.line(nothing) }
    for step in plan.steps { Console.line(vgpus.text(of: step)) }
    for note in plan.notes { Console.line(note) }
}
