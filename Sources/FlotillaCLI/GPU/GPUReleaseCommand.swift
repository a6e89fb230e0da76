import ArgumentParser
import HostKit
import MigrationModel
import Passthrough

struct GPUReleaseCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "release", abstract: "Gives functions back to the drivers they had before `flotilla gpu bind`.",
        discussion: """
            With all that was taken along with them. What a VM left in a device is reset first where the device can be. One \
            that was bound at boot goes to the driver the kernel picks, until the next boot. Exits 3 when refused: nothing \
            was changed.
            """)

    @OptionGroup var host: GPUHost
    @Argument(help: ArgumentHelp("PCI addresses, 0000:3b:00.0 or 3b:00.0.", valueName: "address"))
    var addresses: [PciAddress]
    @Flag(help: "Print every write, do none.") var dryRun = false
    @Flag(help: "Print JSON.") var json = false

    func validate() throws {
        if !host.isLive && !dryRun { throw ValidationError("A recorded device tree releases nothing: add --dry-run") }
    }

    func run() async throws {
        let (host, addresses) = (host, addresses)
        // This host's notes say nothing of a recorded tree.
        let folder = host.isLive ? GPULedger.folder : host.sysfs.path("flotilla")
        let binder = Binder(sysfs: host.sysfs, folder: folder)
        if dryRun {
            let (plan, resets) = try await refusable {
                let plan = try binder.plan(release: addresses, observe: host.observe)
                return (plan, host.isLive ? try Self.dirty(plan.functions.map(\.address)).compactMap(\.resetting) : [])
            }
            if !json {
                for function in plan.functions {
                    Console.line("\(function.address) would go to \(function.driver.text)")
                }
            }
            return try showWrites(resets + plan.writes, host.sysfs, json: json, nothing: "not bound: nothing to do")
        }
        try requireRoot()
        let (changes, problem) = try await refusable {
            var problem: MigrationError?
            let changes = try binder.release(
                addresses, before: { problem = Self.reset($0) }, observe: host.observe)
            return (changes, problem)
        }
        if let problem { Console.complain("warning: \(problem)") }
        try showChanges(changes, json: json, nothing: "not bound: nothing to do")
    }

    /// What is dirty can be reset only while no driver of the host's has it. What can't be reset stays dirty in the ledger.
    private static func reset(_ addresses: [String]) -> MigrationError? {
        do {
            let dirty = try dirty(addresses)
            if !dirty.isEmpty { try GPULedger().reset(dirty) }
            return nil
        } catch { return error as? MigrationError ?? MigrationError(.internal, "\(error)") }
    }

    private static func dirty(_ addresses: [String]) throws -> [GPUResource] {
        try GPULedger().reservations().filter { $0.state == .dirty }.map(\.resource).filter {
            $0.function.map { addresses.contains($0.description) } ?? false
        }
    }
}

extension String? {
    fileprivate var text: String {
        guard let driver = self else { return "the driver the kernel picks" }
        return driver.isEmpty ? "no driver" : driver
    }
}
