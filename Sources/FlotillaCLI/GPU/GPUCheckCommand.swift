import ArgumentParser
import HostKit
import MigrationModel
import Passthrough

struct GPUCheckCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "check", abstract: "Says whether functions can be handed to a VM, and what to do where not.",
        discussion: "Changes nothing. Exits 3 if a requirement is not met.")

    @OptionGroup var host: GPUHost
    @Argument(help: ArgumentHelp("PCI addresses, 0000:3b:00.0 or 3b:00.0.", valueName: "address"))
    var addresses: [PciAddress]
    @Option(help: ArgumentHelp("For a vGPU of this profile on them, not the whole GPU.", valueName: "profile"))
    var vgpu: String?
    @Flag(help: "Print JSON.") var json = false

    func run() async throws {
        let found = try await blocking("gpu check") { [host, addresses, vgpu] in
            let line = host.isLive ? (try? Files.read("/proc/cmdline")) ?? [] : []
            let tree = try host.observe()
            // Only where it decides.
            let gpus =
                host.isLive && vgpu.map(VgpuProfile.init)?.gpuInstance != nil ? tree.functions.map(\.address) : []
            return checkDevices(
                addresses, vgpu: vgpu, in: tree, commandLine: String(decoding: line, as: UTF8.self),
                migs: gpus.isEmpty ? [:] : VgpuHost().migs(of: gpus), users: host.users)
        }
        if json {
            Console.line(try jsonLine(found))
        } else {
            let rows = found.map { [$0.verdict.rawValue, $0.subject, $0.requirement, $0.found] }
            for line in table(["", "what", "requirement", "found"], rows) { Console.line(line) }
            for requirement in found {
                if let remedy = requirement.remedy {
                    Console.line("  \(requirement.verdict.rawValue): \(requirement.subject): \(remedy)")
                }
            }
        }
        if found.contains(where: { $0.verdict == .fail }) { throw ExitCode(Exit.blocked.rawValue) }
    }
}
