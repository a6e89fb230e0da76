import ArgumentParser
import CLinux
import Convert
import Deploy
import FlotillaProtocol
import Glibc
import HostKit
import Messaging
import MigrationModel
import Passthrough
import SwiftProtobuf
import Worker

struct DoctorCommand: AsyncParsableCommand {
    private struct Report: Encodable { let findings: [Examination.Finding] }

    static let configuration = CommandConfiguration(
        commandName: "doctor", abstract: "Looks whether this host has what it needs, and says what to do where not.",
        discussion: """
            Without a configuration: libvirt, KVM, IOMMU of this host, the programs its work needs and what was noted of \
            its devices. With a worker's: also its keys and \
            certificate, its broker and what it may do there, and pools. With the coordinator's: also its keys, \
            certificate and broker, and, of each host, whether it was heard of and its clock is right. Changes nothing \
            but for a probe file without a name in each pool. Exits 1 if something fails.
            """)

    @Option(help: ArgumentHelp("A worker's configuration.", valueName: "file"), completion: .file())
    var worker: String?
    @Option(help: ArgumentHelp("The coordinator's configuration.", valueName: "file"), completion: .file())
    var coordinator: String?
    @Option(help: ArgumentHelp("libvirt's URI, without a configuration.", valueName: "uri"))
    var libvirt = "qemu:///system"
    @Option(help: .hidden) var gpuRecords = GPULedger.folder
    @Flag(help: "Print JSON.") var json = false

    func validate() throws {
        if worker != nil && coordinator != nil { throw ValidationError("One configuration at a time") }
    }

    func run() async throws {
        var examination = Examination(devices: DeviceHost(folder: gpuRecords))
        if let coordinator {
            await examination.examine(coordinator: coordinator)
        } else if let worker {
            await examination.examine(worker: worker)
        } else {
            await examination.examineHost(libvirt: libvirt, pools: [])
        }
        if json {
            Console.line(try jsonLine(Report(findings: examination.findings)))
        } else {
            for line in table(["", "what", "found"], examination.findings.map(\.row)) { Console.line(line) }
            for finding in examination.findings {
                if let remedy = finding.remedy { Console.line("  \(finding.subject): \(remedy)") }
            }
        }
        if examination.findings.contains(where: { $0.verdict == .fail }) { throw ExitCode(Exit.failed.rawValue) }
    }
}

/// What was looked at and found.
struct Examination {
    let devices: DeviceHost

    init(devices: DeviceHost) { self.devices = devices }

    enum Verdict: String, Encodable {
        case pass, warn, fail
        /// Can't be seen from here; the remedy says how to look.
        case unknown
    }

    struct Finding: Encodable {
        var verdict: Verdict
        var subject: String
        var found: String
        var remedy: String?

        private var label: String {
            switch verdict {
            case .pass: "ok"
            case .warn: "warning"
            case .fail: "FAILS"
            case .unknown: "unknown"
            }
        }

        var row: [String] { [label, subject, found] }
    }

    private(set) var findings: [Finding] = []

    mutating func note(_ subject: String, _ verdict: Verdict, _ found: String, _ remedy: String? = nil) {
        findings.append(Finding(verdict: verdict, subject: subject, found: found, remedy: remedy))
    }

    /// - Parameter remedy: where the error knows none.
    mutating func note(_ subject: String, _ error: any Error, remedy: String? = nil) {
        let error = error as? MigrationError ?? MigrationError(.unknown, "\(error)")
        note(subject, .fail, error.message + (error.cause.map { ": \($0)" } ?? ""), error.hint ?? remedy)
    }

    /// Members refuse messages from clocks that are more than `FleetMember.clockTolerance` ahead. The kernel knows whether
    /// something keeps its clock right: adjtimex(2).
    mutating func examineClock() {
        let remedy =
            "run chrony or systemd-timesyncd: members refuse what is signed more than "
            + "\(FleetMember.clockTolerance.components.seconds) s in the future"
        switch flotilla_clock_error() {
        case -2: note("clock", .unknown, "the kernel does not say whether it is set by NTP", remedy)
        case -1: note("clock", .warn, "nothing keeps it right", remedy)
        case let microseconds: note("clock", .pass, "set by NTP, \(microseconds / 1000) ms off at most")
        }
    }

    mutating func examineHost(libvirt uri: String, pools: [PoolFolder]) async {
        examineClock()
        examinePrograms()
        // Where they are damaged, the host is looked at as one that has none.
        let devices = examineRecords() ? devices : DeviceHost(folder: "\(devices.folder)/none")
        let connection: LibvirtConnection
        do { connection = try await blocking("doctor") { try LibvirtConnection(uri: uri) } } catch {
            return note("libvirt", error)
        }
        do {
            let profile = try await blocking("doctor") {
                try hostProfile(name: "this host", connection: connection, pools: pools, devices: devices)
            }
            note(
                "libvirt", .pass,
                "\(profile.libvirtVersion) at \(uri), \(profile.hypervisor) \(profile.hypervisorVersion)")
            if profile.domainType == "qemu" {
                note("KVM", .warn, profile.domainTypeReason, "guests run emulated, many times slower")
            } else {
                note("KVM", .pass, "domains of type \(profile.domainType)")
            }
            note(
                "EFI guests", profile.efiFirmware ? .pass : .warn,
                profile.efiFirmware ? "firmware there" : "no firmware",
                profile.efiFirmware ? nil : "install ovmf")
            examine(profile.pools)
            if profile.iommuEnabled {
                let groups = Set(profile.pciFunctions.map(\.iommuGroup)).subtracting([-1])
                note("IOMMU", .pass, "on, \(groups.count) groups")
                note(
                    "VFIO", profile.vfioAvailable ? .pass : .warn,
                    profile.vfioAvailable ? "there" : "vfio-pci is missing",
                    profile.vfioAvailable ? nil : "load it: modprobe vfio-pci")
            } else {
                note(
                    "IOMMU", .warn, "off: no GPU can be passed through",
                    profile.iommuRemedy)
            }
        } catch { note("host", error) }
    }

    private mutating func examinePrograms() {
        note(
            "qemu-img", QEMUImage.program, without: "disks in formats of others (qcow2, VHD, VHDX, VDI) can't be read",
            remedy: "install qemu-utils")
        note(
            "swtpm", tpmEmulatorInstalled() ? "there" : nil, without: "VMs with a TPM are defined without it",
            remedy: "install swtpm and swtpm-tools")
        for program in devices.vgpus.neededPrograms() {
            note(program.name, program.path, without: program.without, remedy: program.remedy)
        }
    }

    private mutating func note(_ program: String, _ place: String?, without: String, remedy: String) {
        if let place {
            note(program, .pass, place)
        } else {
            note(program, .warn, "not there: \(without)", remedy)
        }
    }

    /// What flotilla has noted of this host's devices. Returns whether it can be read.
    private mutating func examineRecords() -> Bool {
        let failed = findings.count { $0.verdict == .fail }
        do { note("reserved devices", .pass, "\(try devices.ledger.reservations().count)") } catch {
            note("reserved devices", error)
        }
        do { note("vGPUs made here", .pass, "\(try devices.vgpus.records().count)") } catch {
            note("vGPUs made here", error)
        }
        return findings.count { $0.verdict == .fail } == failed
    }

    private mutating func examine(_ pools: [Pool]) {
        for pool in pools {
            note(
                "pool \(pool.name)", pool.writable ? .pass : .fail,
                pool.writable ? "\(pool.path), \(byteText(pool.freeBytes)) free" : "\(pool.path): \(pool.problem)",
                pool.writable ? nil : "check the owner, mode and mount of the folder")
        }
    }
}
