package import ArgumentParser
import Glibc
import Logging
import MigrationModel

/// The `flotilla` command: parsing, exit codes, and nothing else.
package struct Flotilla: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "flotilla",
        abstract: "Moves virtual machines from VMware to KVM and keeps their GPUs.",
        discussion: """
            Exit codes: 0 done, 1 failed, 2 usage, 3 preflight blocked (nothing was changed), 4 cancelled, \
            75 try again (the same command continues where it stopped).

            Shell completions: flotilla --generate-completion-script bash|zsh|fish
            """,
        version: "flotilla \(version)",
        subcommands: [
            MigrateCommand.self, AssessCommand.self, InventoryCommand.self, ManifestCommand.self, DiskCommand.self,
            CoordinatorCommand.self, WorkerCommand.self, MigrationCommand.self, HostCommand.self, GPUCommand.self,
            QueueCommand.self, FleetCommand.self, DoctorCommand.self,
        ])

    package init() {}

    /// Runs the command line of this process and exits.
    package static func start() async -> Never {
        // A reader that went away is an error of the write, not a reason to die.
        signal(SIGPIPE, SIG_IGN)
        do {
            var command = try parseAsRoot()
            if var command = command as? any AsyncParsableCommand {
                try await command.run()
            } else {
                try command.run()
            }
            leave(0)
        } catch let code as ExitCode {
            leave(code.rawValue)
        } catch let error as MigrationError {
            Console.complain("flotilla: error: \(error.message)" + (error.cause.map { ": \($0)" } ?? ""))
            if let hint = error.hint { Console.complain("  \(hint)") }
            leave(Exit(error).rawValue)
        } catch {
            let code = exitCode(for: error)
            let text = fullMessage(for: error)
            guard code == .success else {
                Console.complain(text)
                leave(code == .validationFailure ? Exit.usage.rawValue : Exit.failed.rawValue)
            }
            Console.line(text)
            leave(0)
        }
    }
}

private func leave(_ code: Int32) -> Never {
    Console.flush()
    exit(code)
}

/// What the process says when it ends.
enum Exit: Int32 {
    case done = 0
    case failed = 1
    case usage = 2
    case blocked = 3
    case cancelled = 4
    /// EX_TEMPFAIL of sysexits.h.
    case tryAgain = 75

    init(_ error: MigrationError) {
        switch error.code {
        case .unavailable, .resourceExhausted: self = .tryAgain
        case .cancelled: self = .cancelled
        default: self = .failed
        }
    }
}
