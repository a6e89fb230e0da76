import FlotillaProtocol
import Foundation
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

@Suite struct LedgerTests {
    let folder: TemporaryFolder
    let ledger: GPULedger
    let web = GPUOwner(domain: "web", migration: "m-1", fence: 3, libvirt: "qemu:///system")
    let render = GPUOwner(domain: "render", migration: "m-2", fence: 1)

    init() throws {
        folder = try TemporaryFolder()
        ledger = GPULedger(folder: "\(folder.path)/gpu", boot: "boot-1")
    }

    func pci(_ text: String, partOf parent: String? = nil) throws -> GPUResource {
        GPUResource(function: try #require(PciAddress(text)), partOf: parent.flatMap(PciAddress.init))
    }

    func states(_ ledger: GPULedger) throws -> [String] {
        try ledger.reservations().map { "\($0.resource.key) \($0.owner.domain) \($0.state.rawValue)" }
    }

    @Test func takesAllOrNothingAndSaysWhoHasIt() throws {
        let (a, b, c) = (try pci("0000:3b:00.0"), try pci("0000:3b:00.1"), try pci("0000:5e:00.0"))
        #expect(try ledger.reservations().isEmpty)
        try ledger.reserve([a, b], for: web)
        let error = try #require(failure { try ledger.reserve([c, b], for: render) })
        #expect(error.code == .resourceExhausted && error.message.contains("0000:3b:00.1 is reserved for domain web"))
        #expect(try states(ledger) == ["pci:0000:3b:00.0 web reserved", "pci:0000:3b:00.1 web reserved"])
        // Another process sees the same.
        #expect(try states(GPULedger(folder: "\(folder.path)/gpu", boot: "boot-1")).count == 2)
        try ledger.reserve([a, b], for: web)
        #expect(try ledger.reservations(of: "m-1").count == 2)
    }

    @Test func theLargerFenceWins() throws {
        let a = try pci("0000:3b:00.0")
        try ledger.reserve([a], for: web)
        let later = GPUOwner(domain: "web-2", migration: "m-1", fence: 4)
        try ledger.reserve([a], for: later)
        for stale in [
            failure { try ledger.reserve([a], for: web) }, failure { try ledger.release(of: web) },
            failure { try ledger.forget([a], of: web) },
        ] {
            #expect(stale?.code == .aborted && stale?.message.contains("fence 3") == true)
        }
        #expect(try states(ledger) == ["pci:0000:3b:00.0 web-2 reserved"])
        // Also once nothing is held any more.
        try ledger.forget([a], of: later)
        #expect(failure { try ledger.reserve([a], for: web) }?.code == .aborted)
        // Fences of another migration have nothing to do with it.
        try ledger.reserve([a], for: render)
    }

    @Test func wholeAndPartExcludeEachOther() throws {
        let physical = try pci("0000:3b:00.0")
        let one = try pci("0000:3b:00.4", partOf: "0000:3b:00.0")
        let two = try pci("0000:3b:00.5", partOf: "0000:3b:00.0")
        let mdev = GPUResource(
            mdev: "F0E1D2C3-0000-4000-8000-000000000001",
            partOf: try [#require(one.function), #require(physical.function)])
        #expect(mdev.key == "mdev:f0e1d2c3-0000-4000-8000-000000000001")
        try ledger.reserve([one], for: web)
        try ledger.reserve([two], for: render)
        let whole = try #require(failure { try ledger.reserve([physical], for: render) })
        #expect(whole.message.contains("0000:3b:00.0 goes with 0000:3b:00.4, which is reserved for domain web"))
        #expect(failure { try ledger.reserve([mdev], for: render) }?.code == .resourceExhausted)
        try ledger.forget([one], of: web)
        try ledger.reserve([mdev], for: render)
        #expect(failure { try ledger.reserve([one], for: web) }?.message.contains("mediated device") == true)
    }

    @Test func freedIsDirtyUntilReset() throws {
        let a = try pci("0000:3b:00.0")
        let device = try folder.sub("sys/bus/pci/devices/0000:3b:00.0")
        try FileManager.default.createSymbolicLink(atPath: "\(device)/iommu_group", withDestinationPath: "../../42")
        let sysfs = Sysfs(root: "\(folder.path)/sys")
        try Files.createDirectories("\(device)/vfio-dev/vfio3")
        func reset(heldAt path: String? = nil) -> MigrationError? {
            var holders = DeviceHolders()
            if let path { holders.byPath[path] = "process 7 (qemu)" }
            return failure { try ledger.reset([a], sysfs: sysfs, kernel: KernelWriter(sysfs), holders: holders) }
        }
        try ledger.reserve([a], for: web)
        try ledger.handOver(to: web)
        #expect(try ledger.release([a], of: web) == [a] && ledger.release([a], of: web) == [])
        #expect(try states(ledger) == ["pci:0000:3b:00.0 web dirty"])
        let error = try #require(failure { try ledger.reserve([a], for: render) })
        #expect(error.code == .failedPrecondition && error.message.contains("still holds what domain web"))

        // By its group, and by IOMMUFD's own file of the device.
        for path in ["/dev/vfio/42", "/dev/vfio/devices/vfio3"] {
            #expect(reset(heldAt: path)?.message.contains("process 7 (qemu) has it open through VFIO") == true)
        }
        #expect(reset()?.message.contains("no way to reset") == true)
        try Files.writeAtomically([], to: "\(device)/reset")
        try FileManager.default.createSymbolicLink(atPath: "\(device)/driver", withDestinationPath: "../nvidia")
        #expect(reset()?.message.contains("nvidia drives it") == true)
        try Files.remove("\(device)/driver")
        #expect(try states(ledger).count == 1)
        #expect(reset() == nil)
        #expect(try Files.read("\(device)/reset") == Array("1\n".utf8))
        #expect(try states(ledger).isEmpty)
        try ledger.reserve([a], for: render)
    }

    @Test func itsOwnDirtIsNoObstacleAndARebootCleans() throws {
        let (a, b) = (try pci("0000:3b:00.0"), try pci("0000:5e:00.0"))
        try ledger.reserve([a, b], for: web)
        try ledger.handOver(to: web)
        try ledger.release(of: web)
        try ledger.reserve([a], for: web)
        let rebooted = GPULedger(folder: "\(folder.path)/gpu", boot: "boot-2")
        #expect(try states(rebooted) == ["pci:0000:3b:00.0 web reserved"])
        try rebooted.reserve([b], for: render)
    }

    /// A kernel that started another one reset nothing.
    @Test func kexecCleansNothing() throws {
        let a = try pci("0000:3b:00.0")
        try ledger.reserve([a], for: web)
        try ledger.handOver(to: web)
        try ledger.release(of: web)
        let next = GPULedger(folder: "\(folder.path)/gpu", boot: "boot-2", startedByKexec: true)
        #expect(try states(next) == ["pci:0000:3b:00.0 web dirty"])
        #expect(failure { try next.reserve([a], for: render) }?.code == .failedPrecondition)
        try GPULedger(folder: "\(folder.path)/gpu", boot: "boot-3", startedByKexec: false).reserve([a], for: render)

        let proc = Sysfs(root: try folder.sub("proc"))
        #expect(!wasStartedByKexec(proc: proc))
        _ = try folder.sub("proc/sys/kernel")
        for (type, isKexec) in [("114", false), ("208", true), ("209", true), ("176", false), ("3328", false)] {
            try Files.writeAtomically(Array("\(type)\n".utf8), to: "\(folder.path)/proc/sys/kernel/bootloader_type")
            #expect(wasStartedByKexec(proc: proc) == isKexec, "\(type)")
        }
        _ = try folder.sub("proc/device-tree/chosen/linux,booted-from-kexec")
        #expect(wasStartedByKexec(proc: proc))
    }

    /// What a domain was given by hand is its own as well; what is another's is not.
    @Test func notesWhatADomainNames() throws {
        let (a, b, c) = (try pci("0000:3b:00.0"), try pci("0000:5e:00.0"), try pci("0000:86:00.0"))
        try ledger.reserve([a], for: web)
        try ledger.reserve([b], for: render)
        try ledger.handOver([a, b, c], to: web)
        #expect(
            try states(ledger) == [
                "pci:0000:3b:00.0 web reserved", "pci:0000:5e:00.0 render reserved", "pci:0000:86:00.0 web reserved",
            ])
        #expect(try Set(ledger.release(of: web)) == [a, c])
        var late = web
        late.fence = 2
        #expect(failure { try ledger.handOver([b], to: late) }?.code == .aborted)
    }

    @Test func agreesWithLibvirtAndSysfs() throws {
        for name in ["0000:3b:00.0", "0000:5e:00.0", "0000:86:00.0", "0000:86:00.1"] {
            _ = try folder.sub("sys/bus/pci/devices/\(name)")
        }
        let sysfs = Sysfs(root: "\(folder.path)/sys")
        let (a, b, c, d) = (
            try pci("0000:3b:00.0"), try pci("0000:5e:00.0"), try pci("0000:86:00.0"), try pci("0000:86:00.1")
        )
        let mdev = GPUResource(mdev: "f0e1d2c3-0000-4000-8000-000000000001", partOf: [])
        try ledger.reserve([a, mdev], for: web)
        try ledger.handOver(to: web)
        try ledger.reserve([b], for: render)
        let findings = try ledger.reconcile(
            libvirt: "qemu:///system",
            domains: [
                GPULedger.Domain(name: "other", migration: "", resources: [c, d]),
                GPULedger.Domain(name: "twin", migration: "", resources: [d]),
            ], underWay: ["m-2"], sysfs: sysfs)
        // web has no domain: its function is dirty, its mediated device gone. render's task still runs.
        #expect(
            try states(ledger) == [
                "pci:0000:3b:00.0 web dirty", "pci:0000:5e:00.0 render reserved", "pci:0000:86:00.0 other reserved",
                "pci:0000:86:00.1 other reserved",
            ])
        #expect(
            findings.filter { $0.severity == .warning }.map(\.message) == [
                "domains other and twin both have 0000:86:00.1"
            ])
        #expect(
            try ledger.reconcile(
                libvirt: "qemu:///system",
                domains: [
                    GPULedger.Domain(name: "other", migration: "", resources: [c, d])
                ], underWay: ["m-2"], sysfs: sysfs
            ).isEmpty)
        // libvirt decides.
        let stolen = try ledger.reconcile(
            libvirt: "qemu:///system",
            domains: [GPULedger.Domain(name: "web", migration: "m-1", resources: [c])], underWay: [], sysfs: sysfs)
        #expect(stolen.contains { $0.message.contains("belonged to domain other by the ledger; domain web") })
        #expect(try states(ledger).contains("pci:0000:86:00.0 web reserved"))
    }

    @Test func oneOfManyProcessesWins() async throws {
        let path = "\(folder.path)/gpu"
        let a = try pci("0000:3b:00.0")
        let answers = try await withThrowingTaskGroup(of: MigrationError?.self) { group in
            for number in 0..<16 {
                group.addTask {
                    try await blocking {
                        let owner = GPUOwner(domain: "d\(number)", migration: "m-\(number)", fence: 1)
                        return failure { try GPULedger(folder: path, boot: "b").reserve([a], for: owner) }
                    }
                }
            }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        let winner = try #require(try ledger.reservations().first).owner
        #expect(answers.filter { $0 == nil }.count == 1)
        let losers = answers.compactMap(\.self)
        #expect(losers.count == 15 && losers.allSatisfy { $0.message.contains("reserved for \(winner)") })
    }

    @Test func aDamagedLedgerIsNotAnEmptyOne() throws {
        try ledger.reserve([pci("0000:3b:00.0")], for: web)
        try Files.writeAtomically(Array("{\"version\":1".utf8), to: "\(folder.path)/gpu/ledger.json")
        #expect(failure { try ledger.reserve([], for: web) }?.code == .dataLoss)
    }
}
