import ArgumentParser
import Export
import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf
import VSphere

struct ManifestCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "manifest", abstract: "Shows and checks migration manifests, this program's and HyperSDK's.",
        subcommands: [Show.self, Validate.self])

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Shows what a manifest says of a VM.",
            discussion: """
                SOURCE is a manifest's file, this program's (JSON) or an Artifact Manifest 1.0 of HyperSDK (JSON or \
                YAML); or what one can be made of: vsphere://USER@HOST[/DATACENTER], ova:PATH, ovf:PATH or vmx:PATH. \
                --json prints it as this program's, --hypersdk as HyperSDK's.
                """)

        @Argument(help: ArgumentHelp("The manifest.", valueName: "source"), completion: .file()) var source: String
        @OptionGroup var access: VSphereAccess
        @Option(name: .customLong("vm"), help: "The VM of a source that holds several, by name or managed object id.")
        var vm: String?
        @Flag(help: "Print this program's manifest.") var json = false
        @Flag(name: .customLong("hypersdk"), help: "Print an Artifact Manifest 1.0 of HyperSDK.") var hyperSDK = false
        @Option(
            name: .shortAndLong,
            help: ArgumentHelp("Write --json or --hypersdk to this file; it must not exist.", valueName: "file"))
        var output: String?

        func validate() throws {
            if json && hyperSDK { throw ValidationError("Either --json or --hypersdk") }
            if output != nil && !json && !hyperSDK { throw ValidationError("--output goes with --json or --hypersdk") }
        }

        func run() async throws {
            let origin = try Origin(source, vm: vm, access)
            let (json, hyperSDK) = (json, hyperSDK)
            let text = try await interruptible("manifest") { stop in
                let manifest = try origin.manifest(stop)
                guard hyperSDK else { return json ? try manifest.jsonString() + "\n" : ManifestView(manifest).text }
                return try Self.hyperSDK(manifest, in: origin.folder)
            }
            guard let output else { return Console.out(text) }
            let target = try absolute(output)
            guard !Files.exists(target) else {
                throw MigrationError(.alreadyExists, "\(target) exists", hint: "name another file, or move it away")
            }
            try Files.writeAtomically(Array(text.utf8), to: target, mode: 0o644)
        }

        /// Relative names of disks are taken from the manifest's folder.
        private static func hyperSDK(_ manifest: Manifest, in folder: String) throws -> String {
            var manifest = manifest
            for index in manifest.disks.indices {
                let path = manifest.disks[index].source.path
                guard !path.isEmpty, !path.hasPrefix("/") else { continue }
                manifest.disks[index].source.path = "\(folder)/\(path)"
            }
            return try manifest.hyperSDK { path in
                guard Files.isRegular(path) else {
                    throw MigrationError(
                        .notFound, "\(path) is not there, and an Artifact Manifest states its size",
                        hint: "write it on the machine that has the disks; of a vSphere VM after its migration")
                }
                return try File(path, O_RDONLY).size
            }
        }
    }

    /// What is shown: a manifest's file, or a VM that has none yet.
    private enum Origin {
        case file(String)
        case capture(SourceURL, vm: String?)
        case vsphere(VSphereURL, VIMServer)

        /// Asks for the server's password if no file holds it.
        init(_ text: String, vm: String?, _ access: VSphereAccess) throws {
            try validateVM(vm, of: text)
            guard VSphereURL.isOne(text) else {
                let isSource = ["ova:", "ovf:", "vmx:", "manifest:"].contains { text.hasPrefix($0) }
                self = isSource ? .capture(try SourceURL(parsing: text), vm: vm) : .file(try absolute(text))
                return
            }
            var url = try VSphereURL(parsing: text)
            if let vm { url.vm = vm }
            guard url.vm != nil else {
                throw MigrationError(
                    .invalidArgument, "\(url) holds many VMs and none is named",
                    hint: "name it: --vm NAME, or ?vm=NAME")
            }
            self = .vsphere(url, try access.server(of: url))
        }

        /// Of a manifest's file, where its disks' relative names begin.
        var folder: String {
            guard case .file(let path) = self else { return "" }
            return Files.parent(of: path)
        }

        func manifest(_ stop: StopFlag) throws -> Manifest {
            switch self {
            case .file(let path): return try ManifestFile(path: path).valid(name: path)
            case .capture(let source, let vm): return try captureManifest(from: source, vmName: vm, stop: stop)
            case .vsphere(let url, let server):
                let client = try VIMClient(server, stop: stop)
                defer { client.close() }
                return try Inventory(client, url, stop: stop).virtualMachine(stop: stop)
            }
        }
    }

    struct Validate: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Checks manifests strictly; says what is wrong where, and what to do.",
            discussion: "Exits 1 if one of them has a problem. Disks they name are not looked at; flotilla assess does."
        )

        @Argument(help: ArgumentHelp("Manifests.", valueName: "file"), completion: .file()) var files: [String]
        @Flag(help: "Print one JSON object per file.") var json = false

        private struct Verdict: Encodable {
            struct Problem: Encodable { var path: String, message: String, remedy: String }
            var file: String, form: String?, valid: Bool, problems: [Problem]
        }

        func run() async throws {
            var good = true
            for file in files {
                let verdict = try await Self.judge(file)
                good = good && verdict.valid
                if json {
                    Console.line(try jsonLine(verdict))
                    continue
                }
                Console.line(
                    "\(file): \(verdict.valid ? "valid" : "NOT valid")\(verdict.form.map { " (\($0))" } ?? "")")
                for problem in verdict.problems {
                    Console.line("  \(problem.path.isEmpty ? "" : "\(problem.path): ")\(problem.message)")
                    Console.line("    \(problem.remedy)")
                }
            }
            if !good { throw ExitCode(Exit.failed.rawValue) }
        }

        private static func judge(_ file: String) async throws -> Verdict {
            try await interruptible("manifest") { _ in
                do {
                    let found = try ManifestFile(path: try absolute(file))
                    return Verdict(
                        file: file, form: found.form.rawValue, valid: found.problems.isEmpty,
                        problems: found.problems.map { .init(path: $0.path, message: $0.message, remedy: $0.remedy) })
                } catch let error as MigrationError {
                    return Verdict(
                        file: file, form: nil, valid: false,
                        problems: [.init(path: "", message: error.message, remedy: error.hint ?? "")])
                }
            }
        }
    }
}
