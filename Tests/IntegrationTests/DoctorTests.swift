import Foundation
import HostKit
import TestKit
import Testing

extension Integration {
    /// What `flotilla doctor` finds where something is wrong; on a fleet that is well it is run by the fleet's demo.
    @Suite struct Doctor {
        private struct Report: Decodable { let findings: [Finding] }
        private struct Finding: Decodable { let verdict, subject, found: String; let remedy: String? }

        private func examine(
            _ arguments: String..., environment: [String: String] = [:]
        ) throws -> (status: Int32, findings: [String: Finding]) {
            let outcome = try run(Environment.flotilla(), ["doctor", "--json"] + arguments, environment: environment)
            let findings = try JSONDecoder().decode(Report.self, from: Data(outcome.output.utf8)).findings
            return (
                outcome.status, Dictionary(findings.map { ($0.subject, $0) }, uniquingKeysWith: { first, _ in first })
            )
        }

        @Test func hostAlone() throws {
            let (status, findings) = try examine("--libvirt", "test:///default")
            #expect(status == 0)
            #expect(findings["libvirt"]?.verdict == "pass")
            for subject in ["clock", "KVM", "IOMMU", "EFI guests"] { #expect(findings[subject] != nil, "\(subject)") }
            #expect(findings.values.allSatisfy { $0.verdict == "pass" || $0.remedy != nil })
        }

        /// A program that is missing is a warning that says what can't be done without it.
        @Test func programs() throws {
            let (_, there) = try examine("--libvirt", "test:///default")
            #expect(there["qemu-img"]?.verdict == "pass")
            #expect(there["swtpm"]?.verdict == (Files.exists("/usr/bin/swtpm") ? "pass" : "warn"))
            let (status, without) = try examine("--libvirt", "test:///default", environment: ["PATH": "/nowhere"])
            #expect(status == 0 && without["qemu-img"]?.verdict == "warn")
            #expect(without["qemu-img"]?.remedy == "install qemu-utils")
        }

        /// It is said of the file, not of libvirt, and the rest of the host is looked at.
        @Test(arguments: [("ledger.json", "reserved devices"), ("vgpus.json", "vGPUs made here")])
        func damagedRecords(_ file: String, _ subject: String) throws {
            let folder = try TemporaryFolder()
            try Files.writeAtomically(Array("{".utf8), to: "\(folder.path)/\(file)")
            let (status, findings) = try examine("--libvirt", "test:///default", "--gpu-records", folder.path)
            #expect(status == 1 && findings[subject]?.verdict == "fail")
            #expect(findings[subject]?.found.contains("\(folder.path)/\(file), is damaged") == true)
            #expect(findings[subject]?.remedy?.contains("move it away") == true)
            #expect(findings["libvirt"]?.verdict == "pass" && findings["IOMMU"] != nil)
            #expect(findings.values.filter { $0.verdict == "fail" }.count == 1)
        }

        @Test func libvirtThatIsNotThereFails() throws {
            let (status, findings) = try examine("--libvirt", "qemu+unix:///system?socket=/nowhere")
            #expect(status == 1 && findings["libvirt"]?.verdict == "fail" && findings["qemu-img"] != nil)
        }

        /// Its key may be read by all, its broker isn't there: both are said at once.
        @Test func worker() throws {
            let folder = try TemporaryFolder()
            let path = folder.path
            for part in ["pool", "trusted"] { try Files.createDirectories("\(path)/\(part)", mode: 0o700) }
            try Files.writeAtomically(Array("key".utf8), to: "\(path)/key", mode: 0o644)
            let settings = """
                host: kvm1
                broker: {addresses: ["localhost:1"], plaintext: true, password-file: \(path)/password}
                keys: {own: \(path)/key, trusted: \(path)/trusted}
                libvirt: test:///default
                pools: [{name: default, path: \(path)/pool}]
                """
            try Files.writeAtomically(Array(settings.utf8), to: "\(path)/worker.yaml", mode: 0o600)
            let (status, findings) = try examine("--worker", "\(path)/worker.yaml")
            #expect(status == 1)
            #expect(findings["keys"]?.verdict == "fail" && findings["broker"]?.verdict == "fail")
            #expect(findings["broker"]?.found.contains("localhost:1 can't be reached") == true)
            #expect(findings["broker"]?.remedy?.contains("broker.addresses") == true)
            #expect(findings["pool default"]?.verdict == "pass" && findings["libvirt"]?.verdict == "pass")
        }

        /// The broker lets a worker do things by its user's name: another than the host's could do nothing.
        @Test(arguments: [
            ("user: kvm2, password-file: /nowhere", "'kvm2' is not the host 'kvm1'", "leave it away"),
            ("user: kvm1", "goes with password-file", "password-file"),
        ]) func brokerUser(_ setting: String, _ found: String, _ remedy: String) throws {
            let folder = try TemporaryFolder()
            let settings = """
                host: kvm1
                broker: {addresses: ["localhost:1"], \(setting)}
                keys: {own: /nowhere, trusted: /nowhere}
                pools: [{name: default, path: \(folder.path)}]
                """
            try Files.writeAtomically(Array(settings.utf8), to: "\(folder.path)/worker.yaml", mode: 0o600)
            let (status, findings) = try examine("--worker", "\(folder.path)/worker.yaml")
            let configuration = try #require(findings["configuration"])
            #expect(status == 1 && configuration.verdict == "fail")
            #expect(configuration.found.contains(":2: broker.user \(found)"), "\(configuration.found)")
            #expect(configuration.remedy?.contains(remedy) == true)
        }

        /// Definitions without hosts, taken for those of the fleet, would be imported.
        @Test func definitionsOfNoFleet() throws {
            let outcome = try run(Environment.flotilla(), ["fleet", "definitions", "--dir", "/nowhere"])
            #expect(outcome.status == 1 && outcome.output.isEmpty)
            #expect(outcome.errors.contains("/nowhere holds no fleet"))
            #expect(outcome.errors.contains("flotilla fleet init"))
        }
    }
}
