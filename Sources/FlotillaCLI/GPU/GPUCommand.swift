import ArgumentParser

struct GPUCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "gpu", abstract: "This host's GPUs: what there is, and handing it to virtual machines.",
        discussion: """
            Needs no fleet. All that changes the host has --dry-run, which prints every write and program, and goes back. No \
            NVIDIA card was at hand: vGPUs are tested on trees made from NVIDIA's documented layout, with stand-ins for its \
            programs; binding on a real kernel with an emulated IOMMU.
            """,
        subcommands: [
            GPUListCommand.self, GPUCheckCommand.self, GPUPrepareCommand.self, GPUBindCommand.self,
            GPUReleaseCommand.self, GPUResetCommand.self, GPUProfilesCommand.self, GPUCreateCommand.self,
            GPUDestroyCommand.self, GPURestoreCommand.self, GPUBaselineCommand.self,
        ])
}
