import ArgumentParser
import FlotillaProtocol
import FoundationEssentials
import HostKit
import MigrationModel
import Passthrough

struct GPUBaselineCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "baseline", abstract: "What benchmarks give on this host's bare metal, to compare guests with.",
        subcommands: [Record.self, List.self, Remove.self])

    struct Record: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Runs a benchmark and keeps its median.",
            discussion: """
                For flotilla migrate --gpu-benchmark NAME: the guest then runs the same command as often, and may be 2 % \
                worse. The GPU has to be on its own driver, with nothing else running. For example:

                  flotilla gpu baseline record gemm --gpu 3b:00.0 --pattern 'GFLOPS: ([0-9.]+)' -- /opt/bench/gemm --size 8192
                """)

        @Argument(help: "The baseline's name.") var name: String
        @Option(help: "The GPU that is measured; the guest has to get one of the same vendor and device id.")
        var gpu: PciAddress?
        @Option(
            help: ArgumentHelp(
                "Finds the figure in the output: its first group, or all of it (default: the last number).",
                valueName: "regex"))
        var pattern: String?
        @Flag(help: "A smaller figure is the better one.") var lowerIsBetter = false
        @Option(help: "How often it runs; the median counts.") var runs = 3
        @Option(help: ArgumentHelp("How long one run may take.", valueName: "seconds")) var limit = 600
        @Flag(help: "Run it, but keep nothing.") var dryRun = false
        @Flag(help: "Print JSON.") var json = false
        @Argument(parsing: .postTerminator, help: "The benchmark, after --: its full path, and its arguments.")
        var command: [String] = []

        func validate() throws {
            guard (1...100).contains(runs) else { throw ValidationError("--runs is 1 to 100") }
            guard (1...86400).contains(limit) else { throw ValidationError("--limit is 1 to 86400 seconds") }
            guard command.first?.hasPrefix("/") == true else {
                throw ValidationError("name the benchmark after --, with its full path")
            }
        }

        func run() async throws {
            var baseline = GPUBaseline(
                name: name, command: command, pattern: pattern, better: lowerIsBetter ? .lower : .higher, limit: limit,
                recorded: Int64(Date().timeIntervalSince1970))
            try baseline.validate()
            if !dryRun { try requireRoot() }
            if let gpu { baseline.gpu = try measurable(gpu) }
            for run in 1...runs {
                let figure = try await blocking("benchmark") { [baseline] in try measure(baseline) }
                baseline.figures.append(figure)
                Console.complain("run \(run) of \(runs): \(figure)")
            }
            if !dryRun { try await blocking("gpu") { [baseline] in try GPUBaselines().save(baseline) } }
            if json { return Console.line(try jsonLine(baseline)) }
            Console.line("\(name): \(baseline.figure), \(dryRun ? "not kept" : "kept")")
        }

        /// Its vendor and device id, when bare metal can use it.
        private func measurable(_ address: PciAddress) throws -> String {
            guard let function = try pciInventory().first(where: { $0.address == "\(address)" }) else {
                throw MigrationError(
                    .notFound, "this host has no PCI device \(address)", hint: "flotilla gpu list shows what there is")
            }
            guard !function.driver.isEmpty, !function.driver.hasPrefix("vfio") else {
                throw MigrationError(
                    .failedPrecondition,
                    "GPU \(address) has \(function.driver.isEmpty ? "no driver" : "the driver \(function.driver)"), "
                        + "so no benchmark can use it",
                    hint: "flotilla gpu release \(address) gives it back to its own driver")
            }
            return function.id.text
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Lists the baselines of this host.")

        @Flag(help: "Print JSON.") var json = false

        func run() async throws {
            let baselines = try await blocking("gpu") { try GPUBaselines().all() }
            if json { return Console.line(try jsonLine(baselines)) }
            let rows = baselines.map { baseline in
                [
                    baseline.name, "\(baseline.figure)", baseline.better.rawValue, "\(baseline.figures.count)",
                    baseline.gpu ?? "-", baseline.command.joined(separator: " "),
                ]
            }
            for line in table(["baseline", "figure", "better", "runs", "GPU", "command"], rows) { Console.line(line) }
        }
    }

    struct Remove: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Forgets a baseline.")

        @Argument(help: "The baseline's name.") var name: String
        @Flag(help: "Say which file would be removed, remove nothing.") var dryRun = false

        func run() async throws {
            if !dryRun { try requireRoot() }
            let (name, dryRun, baselines) = (name, dryRun, GPUBaselines())
            try await blocking("gpu") {
                if dryRun { _ = try baselines.read(name) } else { try baselines.remove(name) }
            }
            Console.line(dryRun ? "would remove \(baselines.path(of: name))" : "forgot \(name)")
        }
    }
}

/// One run on this host.
private func measure(_ baseline: GPUBaseline) throws -> Double {
    let outcome = try Program.run(
        baseline.command[0], Array(baseline.command.dropFirst()), limit: .seconds(baseline.limit))
    guard outcome.status == 0 else {
        let end = outcome.output.split(whereSeparator: \.isNewline).last.map { ": \($0.prefix(300))" } ?? ""
        throw MigrationError(
            .failedPrecondition, "benchmark \(baseline.name) ended with status \(outcome.status)\(end)",
            hint: "run \(baseline.command[0]) by hand")
    }
    guard !outcome.isCut else {
        throw MigrationError(
            .failedPrecondition, "benchmark \(baseline.name) printed more than 1 MiB: the figure may be in the rest",
            hint: "have it print less, or name a script that prints the figure alone")
    }
    return try baseline.figure(in: outcome.output)
}
