import ArgumentParser

struct GPUCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "gpu", abstract: "This host's GPUs: what there is, and handing it to virtual machines.",
        discussion: "Needs no fleet. What moves a device or edits the host's setup has --dry-run; all of it goes back.",
        subcommands: [
            GPUListCommand.self, GPUCheckCommand.self, GPUPrepareCommand.self, GPUBindCommand.self,
            GPUReleaseCommand.self, GPUResetCommand.self, GPUProfilesCommand.self, GPUCreateCommand.self,
            GPUDestroyCommand.self, GPURestoreCommand.self, GPUBaselineCommand.self,
        ])
}
