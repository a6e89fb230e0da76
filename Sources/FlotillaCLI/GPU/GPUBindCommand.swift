import ArgumentParser
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough

struct GPUBindCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "bind", abstract: "Takes functions from their drivers for vfio-pci, ready for a VM.",
        discussion: """
            All functions of a slot and what depends on them move together; on any failure all are back with their drivers. \
            Bridges, devices of domains, mounted disks and open VFIO groups are always refused. Exits 3 when refused: nothing \
            was changed. `flotilla gpu release` gives them back; a reboot does too.
            """)

    @OptionGroup var host: GPUHost
    @Argument(help: ArgumentHelp("PCI addresses, 0000:3b:00.0 or 3b:00.0.", valueName: "address"))
    var addresses: [PciAddress]
    @Flag(help: "Also take unrelated members of the same IOMMU group from the host.") var withGroup = false
    @Flag(help: "Take a GPU that shows the kernel's console.") var forceConsole = false
    @Flag(name: .customLong("force-boot-vga"), help: "Take the display the host booted with.") var forceBootVGA = false
    @Flag(help: "Take it from processes and from network interfaces that are up.") var forceInUse = false
    @Flag(help: "Print every write, do none.") var dryRun = false
    @Flag(help: "Print JSON.") var json = false

    func validate() throws {
        if !host.isLive && !dryRun { throw ValidationError("A recorded device tree binds nothing: add --dry-run") }
    }

    private var consent: Consent {
        var consent: Consent = []
        if withGroup { consent.insert(.group) }
        if forceConsole { consent.insert(.console) }
        if forceBootVGA { consent.insert(.bootVGA) }
        if forceInUse { consent.insert(.use) }
        return consent
    }

    func run() async throws {
        let (host, addresses, consent) = (host, addresses, consent)
        let binder = Binder(sysfs: host.sysfs)
        let observe = { @Sendable in
            let tree = try host.observe()
            try requireWhole(addresses, in: tree)
            return tree
        }
        if dryRun {
            let plan = try await refusable { try binder.plan(bind: addresses, consent: consent, observe: observe) }
            return try show(plan)
        }
        try requireRoot()
        let changes = try await refusable { try binder.bind(addresses, consent: consent, observe: observe) }
        try showChanges(changes, json: json, nothing: "bound already: nothing to do")
    }

    private func show(_ plan: Binder.Plan) throws {
        if !json {
            for member in plan.handover.groupMembers {
                Console.line("also, as a member of IOMMU group \(member.function.iommuGroup): \(member.function.text)")
            }
            if plan.loadsDriver { Console.line("would run: modprobe vfio-pci") }
        }
        try showWrites(plan.writes, host.sysfs, json: json, nothing: "bound already: nothing to do")
    }
}

func showChanges(_ changes: [Binder.Change], json: Bool, nothing: String) throws {
    if json { return Console.line(try jsonLine(changes)) }
    if changes.isEmpty { Console.line(nothing) }
    for change in changes {
        let from = change.from.isEmpty ? "no driver" : change.from
        Console.line("\(change.address)  \(from) -> \(change.to.isEmpty ? "no driver" : change.to)")
    }
}
