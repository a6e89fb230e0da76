import ArgumentParser

/// The fleet's processes with tasks that do nothing, for `Tests/benchmarks/fleet/run`. Everything but the handlers is
/// what `flotilla coordinator` and `flotilla worker` run. Each process obeys lines on its standard input and answers each
/// with one line of JSON; it ends with its input.
@main
struct FleetBenchmark: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        subcommands: [KeysCommand.self, CoordinatorProcess.self, WorkerProcess.self, HostsProcess.self])
}
