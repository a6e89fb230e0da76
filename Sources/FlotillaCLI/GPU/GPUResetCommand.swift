import ArgumentParser
import HostKit
import MigrationModel
import Passthrough

struct GPUResetCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "reset", abstract: "Resets functions that a VM gave back, so that another VM may have them.",
        discussion: """
            They are taken from their drivers for that long, under the rules of `flotilla gpu bind`. A function that the \
            kernel can't reset needs a reboot. Exits 3 when refused.
            """)

    @OptionGroup var host: GPUHost
    @Argument(help: ArgumentHelp("PCI addresses, 0000:3b:00.0 or 3b:00.0.", valueName: "address"))
    var addresses: [PciAddress]
    @Flag(help: "Print every write, do none.") var dryRun = false

    func validate() throws {
        if !host.isLive { throw ValidationError("A recorded device tree can't be reset") }
    }

    func run() async throws {
        let (host, addresses) = (host, addresses)
        let devices = DeviceHost(sysfs: host.sysfs)
        if dryRun {
            let writes = try await refusable { try devices.plan(reset: addresses, observe: host.observe) }
            return try showWrites(writes, host.sysfs, json: false, nothing: "not dirty: nothing to do")
        }
        try requireRoot()
        let freed = try await refusable { try devices.reset(addresses, observe: host.observe) }
        if freed.isEmpty { return Console.line("not dirty: nothing to do") }
        for function in freed { Console.line("\(function): reset, free") }
    }
}
