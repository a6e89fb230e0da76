import Foundation
import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// A recorded machine that can be written to.
struct BindRig {
    let folder: TemporaryFolder
    let sysfs: Sysfs

    /// The console of the recorded GPU is taken off it unless `console`.
    init(console: Bool = false) throws {
        folder = try TemporaryFolder("sys")
        sysfs = Sysfs(root: "\(folder.path)/sys")
        try unpackRecordedMachine(to: sysfs.root)
        if !console {
            try Files.createDirectories(sysfs.path("class/vtconsole/vtcon1"))
            try Files.writeAtomically(
                Array("(M) frame buffer device\n".utf8), to: sysfs.path("class/vtconsole/vtcon1/name"))
            try Files.writeAtomically(Array("0\n".utf8), to: sysfs.path("class/vtconsole/vtcon1/bind"))
        }
    }

    func binder(_ kernel: FixtureKernel) -> Binder {
        Binder(
            sysfs: sysfs, kernel: kernel, folder: "\(folder.path)/state", boot: "boot-1", proc: "\(folder.path)/proc",
            loadDriver: {})
    }

    func observe(_ around: Surroundings = Surroundings()) -> () throws -> DeviceTree {
        { [sysfs] in try DeviceTree(sysfs, around: around) }
    }

    /// A disk of 0000:09:00.0, and what procfs says of it.
    func disk(
        named name: String = "nvme1n1", at folder: String = "devices/0000:09:00.0/nvme/nvme1", number: String = "259:7",
        mounts: String = "", _ around: inout Surroundings
    ) throws {
        try Files.createDirectories(sysfs.path("\(folder)/\(name)"))
        try Files.createDirectories(sysfs.path("class/block"))
        try Files.writeAtomically(Array("\(number)\n".utf8), to: sysfs.path("\(folder)/\(name)/dev"))
        try FileManager.default.createSymbolicLink(
            atPath: sysfs.path("class/block/\(name)"), withDestinationPath: "../../\(folder)/\(name)")
        let proc = try self.folder.sub("proc/self")
        try Files.writeAtomically(Array("\(mounts)\n".utf8), to: "\(proc)/mountinfo")
        around.proc = "\(self.folder.path)/proc"
    }

    func driver(_ address: String) -> String { sysfs.linkName("bus/pci/devices/\(address)/driver") ?? "" }

    var journal: String {
        let bytes = (try? Files.read("\(folder.path)/state/bindings.json")) ?? []
        return String(decoding: bytes, as: UTF8.self)
    }
}

func pci(_ text: String) throws -> PciAddress { try #require(PciAddress(text)) }

@Suite struct BinderTests {
    static let gpu = "0000:01:00.0"
    static let audio = "0000:01:00.1"

    @Test func aGPUAndItsAudioGoAndComeBack() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        let before = drivers(rig.sysfs)
        let changes = try rig.binder(kernel).bind([pci(Self.audio)], observe: rig.observe())
        #expect(
            changes == [
                Binder.Change(address: Self.gpu, from: "bochs-drm", to: "vfio-pci"),
                Binder.Change(address: Self.audio, from: "snd_hda_intel", to: "vfio-pci"),
            ])
        #expect(
            kernel.log == [
                "bus/pci/devices/\(Self.gpu)/driver_override vfio-pci",
                "bus/pci/devices/\(Self.audio)/driver_override vfio-pci",
                "bus/pci/devices/\(Self.audio)/driver/unbind \(Self.audio)",
                "bus/pci/devices/\(Self.gpu)/driver/unbind \(Self.gpu)",
                "bus/pci/drivers_probe \(Self.gpu)", "bus/pci/drivers_probe \(Self.audio)",
            ])
        #expect(rig.driver(Self.gpu) == "vfio-pci" && rig.driver(Self.audio) == "vfio-pci")
        #expect(try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()).isEmpty)

        let back = try rig.binder(kernel).release([pci(Self.gpu)], observe: rig.observe())
        #expect(back.map(\.to) == ["bochs-drm", "snd_hda_intel"])
        #expect(drivers(rig.sysfs) == before)
        #expect(try rig.binder(kernel).release([pci(Self.gpu)], observe: rig.observe()).isEmpty)
    }

    @Test func anOverrideAndADriverlessFunctionComeBack() throws {
        let rig = try BindRig()
        let nic = "0000:06:00.0"
        try Files.writeAtomically(Array("e1000e\n".utf8), to: rig.sysfs.path("bus/pci/devices/\(nic)/driver_override"))
        try Files.remove(rig.sysfs.path("bus/pci/devices/0000:09:00.0/driver"))
        let kernel = FixtureKernel(rig.sysfs)
        let before = drivers(rig.sysfs)
        _ = try rig.binder(kernel).bind([pci(nic), pci("0000:09:00.0")], observe: rig.observe())
        #expect(rig.driver(nic) == "vfio-pci" && rig.driver("0000:09:00.0") == "vfio-pci")
        _ = try rig.binder(kernel).release([pci(nic), pci("0000:09:00.0")], observe: rig.observe())
        #expect(drivers(rig.sysfs) == before)
    }

    @Test func whatWasBoundAtBootGoesToTheKernelsChoice() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        try kernel.write("vfio-pci\n", to: "bus/pci/devices/\(Self.gpu)/driver_override")
        try kernel.write("\(Self.gpu)\n", to: "bus/pci/devices/\(Self.gpu)/driver/unbind")
        try kernel.write("\(Self.gpu)\n", to: "bus/pci/drivers_probe")
        #expect(rig.driver(Self.gpu) == "vfio-pci")
        let changes = try rig.binder(kernel).release([pci(Self.gpu)], observe: rig.observe())
        #expect(changes == [Binder.Change(address: Self.gpu, from: "vfio-pci", to: "bochs-drm")])
    }

    /// Its id, which `options vfio-pci ids=` gave that driver at boot, is taken from it; where that can't be, it is told.
    @Test(arguments: [true, false]) func aDriverThatHasItsIDLetsGo(_ forgets: Bool) throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        for address in [Self.gpu, Self.audio] {
            try kernel.write("vfio-pci\n", to: "bus/pci/devices/\(address)/driver_override")
            try kernel.write("\(address)\n", to: "bus/pci/devices/\(address)/driver/unbind")
            try kernel.write("\(address)\n", to: "bus/pci/drivers_probe")
        }
        kernel.writes.withLock { $0.ids = ["1234 1111"] }
        if forgets { try Files.writeAtomically([], to: rig.sysfs.path("bus/pci/drivers/vfio-pci/remove_id")) }
        let error = failure { try rig.binder(kernel).release([pci(Self.gpu)], observe: rig.observe()) }
        #expect(rig.driver(Self.audio) == "snd_hda_intel" && !rig.journal.contains("releasing"))
        #expect(rig.driver(Self.gpu) == (forgets ? "bochs-drm" : "vfio-pci") && (error == nil) == forgets)
        guard let error else { return }
        #expect(error.message.contains("took \(Self.gpu) back") && error.hint?.contains("prepare --revert") == true)
        #expect(try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()).map(\.address) == [Self.audio])
    }

    @Test func groupMembersGoOnlyWithConsentAndComeBackWithTheLast() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        let before = drivers(rig.sysfs)
        let testDevice = "0000:05:02.0"
        let refused = try #require(failure { try rig.binder(kernel).bind([pci(testDevice)], observe: rig.observe()) })
        #expect(refused.code == .failedPrecondition && refused.message.contains("0000:05:01.0 (8086:100e, e1000)"))
        #expect(refused.hint?.contains("--with-group") == true)
        #expect(kernel.log.isEmpty && rig.journal.isEmpty)
        let plan = try rig.binder(kernel).plan(bind: [pci(testDevice)], consent: .group, observe: rig.observe())
        #expect(plan.handover.groupMembers.map(\.function.address) == ["0000:05:01.0"])
        #expect(plan.writes.count == 5 && kernel.log.isEmpty)
        _ = try rig.binder(kernel).bind([pci(testDevice)], consent: .group, observe: rig.observe())
        _ = try rig.binder(kernel).bind([pci("0000:05:01.0")], observe: rig.observe())
        #expect(rig.driver("0000:05:01.0") == "vfio-pci" && rig.driver(testDevice) == "vfio-pci")
        // Somebody asked for the NIC itself meanwhile: it stays until that one goes too.
        _ = try rig.binder(kernel).release([pci(testDevice)], observe: rig.observe())
        #expect(rig.driver("0000:05:01.0") == "vfio-pci" && rig.driver(testDevice) == "")
        _ = try rig.binder(kernel).release([pci("0000:05:01.0")], observe: rig.observe())
        #expect(drivers(rig.sysfs) == before)
    }

    /// Who can't have the other member is told of that one too, not sent from one refusal to the next.
    @Test func aGroupMemberThatCanNotBeTaken() throws {
        let rig = try BindRig()
        try Files.createDirectories(rig.sysfs.path("devices/0000:05:01.0/net/eth5"))
        try Files.createDirectories(rig.sysfs.path("class/net"))
        try Files.writeAtomically(Array("up\n".utf8), to: rig.sysfs.path("devices/0000:05:01.0/net/eth5/operstate"))
        try FileManager.default.createSymbolicLink(
            atPath: rig.sysfs.path("class/net/eth5"), withDestinationPath: "../../devices/0000:05:01.0/net/eth5")
        let why =
            "0000:05:01.0 can't be taken from the host too as it is: 0000:05:01.0 (8086:100e, e1000) is in use by "
            + "network interface eth5, which is up (set it down first"
        let binder = rig.binder(FixtureKernel(rig.sysfs))
        let refused = failure { try binder.bind([pci("0000:05:02.0")], observe: rig.observe()) }
        #expect(refused?.hint?.contains(why) == true, "\(refused?.hint ?? "")")
        #expect(refused?.hint?.contains("--with-group") == false)
        let checked = checkDevices([try pci("0000:05:02.0")], vgpu: nil, in: try rig.observe()())
        #expect(checked.contains { $0.requirement == "IOMMU group" && $0.remedy?.contains(why) == true })
        // With that agreed to, the group is all that is left to agree to.
        let next = failure { try binder.bind([pci("0000:05:02.0")], consent: .use, observe: rig.observe()) }
        #expect(next?.hint?.contains("agree with --with-group that 0000:05:01.0 is taken") == true)
        _ = try binder.plan(bind: [pci("0000:05:02.0")], consent: [.use, .group], observe: rig.observe())
    }

    struct Refusal: Sendable, CustomTestStringConvertible {
        var testDescription: String
        var address: String
        var consent: Consent = [.group, .use]
        var says: String
        /// Nothing may lift it.
        var always = false
        var prepare: @Sendable (BindRig, inout Surroundings) throws -> Void = { _, _ in }
    }

    static let refusals: [Refusal] = [
        Refusal(testDescription: "bridge by header", address: "0000:00:02.0", says: "header type 1", always: true),
        Refusal(
            testDescription: "bridge by class", address: "0000:00:1f.0", says: "is a bridge (class 0601)", always: true),
        Refusal(testDescription: "boot VGA", address: "0000:0b:00.0", says: "boot_vga"),
        Refusal(
            testDescription: "unknown", address: "0000:77:00.0", says: "no PCI function 0000:77:00.0", always: true),
        Refusal(testDescription: "console", address: gpu, says: "kernel's console on fb0") { rig, _ in
            try Files.writeAtomically(Array("1\n".utf8), to: rig.sysfs.path("class/vtconsole/vtcon1/bind"))
        },
        Refusal(testDescription: "process on DRM", address: gpu, consent: .group, says: "process 9 (Xorg)") {
            _, around in
            around.holders.byPath["/dev/dri/card0"] = "process 9 (Xorg)"
        },
        Refusal(testDescription: "domain", address: gpu, says: "domain web", always: true) { _, around in
            around.domains = [
                GPULedger.Domain(name: "web", migration: "", resources: [GPUResource(function: try pci(audio))])
            ]
        },
        Refusal(testDescription: "group held", address: "0000:02:00.0", says: "process 7 (qemu)", always: true) {
            _, around in
            around.holders.byPath["/dev/vfio/12"] = "process 7 (qemu)"
        },
        Refusal(
            testDescription: "virtual functions", address: "0000:03:00.0", says: "2 virtual functions", always: true),
        Refusal(
            testDescription: "network up", address: "0000:06:00.0", consent: .group, says: "interface eth7, which is up"
        ) {
            rig, _ in
            try Files.createDirectories(rig.sysfs.path("devices/0000:06:00.0/net/eth7"))
            try Files.createDirectories(rig.sysfs.path("class/net"))
            try Files.writeAtomically(Array("up\n".utf8), to: rig.sysfs.path("devices/0000:06:00.0/net/eth7/operstate"))
            try FileManager.default.createSymbolicLink(
                atPath: rig.sysfs.path("class/net/eth7"), withDestinationPath: "../../devices/0000:06:00.0/net/eth7")
        },
        Refusal(
            testDescription: "mounted disk", address: "0000:09:00.0", says: "mounted file system on nvme1n1",
            always: true
        ) {
            rig, around in
            try rig.disk(mounts: "36 35 259:7 / /srv rw - ext4 /dev/nvme1n1 rw", &around)
        },
        Refusal(testDescription: "IOMMU off", address: gpu, says: "IOMMU of this host is off", always: true) { rig, _ in
            try Files.remove(rig.sysfs.path("kernel/iommu_groups"))
            try Files.remove(rig.sysfs.path("class/iommu"))
        },
        Refusal(testDescription: "no group", address: gpu, says: "is in no IOMMU group", always: true) { rig, _ in
            try Files.remove(rig.sysfs.path("bus/pci/devices/\(gpu)/iommu_group"))
        },
    ]

    @Test(arguments: refusals) func refuses(_ refusal: Refusal) throws {
        let rig = try BindRig()
        var around = Surroundings()
        try refusal.prepare(rig, &around)
        let kernel = FixtureKernel(rig.sysfs)
        let before = drivers(rig.sysfs)
        let error = try #require(
            failure {
                try rig.binder(kernel).bind(
                    [pci(refusal.address)], consent: refusal.consent, observe: rig.observe(around))
            })
        #expect(error.code == .failedPrecondition && error.message.contains(refusal.says), "\(error)")
        #expect(error.hint?.isEmpty == false && kernel.log.isEmpty && drivers(rig.sysfs) == before)
        let all = failure {
            try rig.binder(kernel).bind(
                [pci(refusal.address)], consent: [.group, .console, .bootVGA, .use], observe: rig.observe(around))
        }
        #expect((all != nil) == refusal.always, "\(String(describing: all))")
    }

    @Test func itsOwnReservationIsNoObstacle() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        let ledger = GPULedger(folder: "\(rig.folder.path)/state", boot: "boot-1")
        let web = GPUOwner(domain: "web", migration: "m-1", fence: 1)
        try ledger.reserve([GPUResource(function: pci(Self.gpu))], for: web)
        var around = Surroundings()
        around.reservations = try ledger.reservations()
        let error = failure { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe(around)) }
        #expect(error?.message.contains("in use by domain web (migration m-1)") == true)
        #expect(try rig.binder(kernel).bind([pci(Self.gpu)], owner: web, observe: rig.observe(around)).count == 2)
    }

    /// Whatever write fails, and if vfio-pci refuses in silence: all back with their drivers.
    @Test(arguments: 1...6) func everyFailureRollsBack(_ failing: Int) throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs, failing: [failing])
        let before = drivers(rig.sysfs)
        let error = try #require(failure { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()) })
        #expect(error.code == .internal && error.message.contains("write \(failing) failed"))
        #expect(error.message.contains("back with its own driver") && drivers(rig.sysfs) == before)
        #expect(!rig.journal.contains(Self.gpu))
        #expect(try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()).count == 2)
    }

    @Test(arguments: [gpu, audio]) func aSilentRefusalIsNoticed(_ refused: String) throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs, refused: [refused])
        let before = drivers(rig.sysfs)
        let error = try #require(failure { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()) })
        #expect(error.message.contains("did not bind \(refused) to vfio-pci") && drivers(rig.sysfs) == before)
    }

    /// A release that fails at any write is finished by the next command.
    @Test(arguments: 7...12) func aFailedReleaseIsFinishedLater(_ failing: Int) throws {
        let rig = try BindRig()
        let before = drivers(rig.sysfs)
        let kernel = FixtureKernel(rig.sysfs, failing: [failing])
        _ = try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe())
        #expect(failure { try rig.binder(kernel).release([pci(Self.gpu)], observe: rig.observe()) } != nil)
        #expect(drivers(rig.sysfs) != before && rig.journal.contains("releasing"))
        try rig.binder(kernel).recover()
        #expect(drivers(rig.sysfs) == before && !rig.journal.contains(Self.gpu))
    }

    /// Since a release failed a VM has it: nothing finishes that release while it does.
    @Test func whatAVMHasMeanwhileIsNotTakenBack() throws {
        let rig = try BindRig()
        let before = drivers(rig.sysfs)
        let kernel = FixtureKernel(rig.sysfs, failing: [7])
        let binder = rig.binder(kernel)
        _ = try binder.bind([pci(Self.gpu)], observe: rig.observe())
        #expect(failure { try binder.release([pci(Self.gpu)], observe: rig.observe()) } != nil)
        #expect(rig.driver(Self.gpu) == "vfio-pci")
        let proc = "\(rig.folder.path)/proc"
        for (device, file) in [("/dev/vfio/11", "7"), ("/dev/vfio/devices/vfio3", "8")] {
            try Files.createDirectories("\(proc)/42/fd")
            try Files.writeAtomically(Array("qemu\n".utf8), to: "\(proc)/42/comm")
            try Files.createDirectories(rig.sysfs.path("bus/pci/devices/\(Self.gpu)/vfio-dev/vfio3"))
            try FileManager.default.createSymbolicLink(
                atPath: "\(proc)/42/fd/\(file)", withDestinationPath: device)
            let writes = kernel.log.count
            let error = failure { try binder.recover() }
            #expect(error?.message.contains("\(Self.gpu) is in use by process 42 (qemu)") == true)
            #expect(error?.hint?.contains("flotilla gpu release \(Self.gpu)") == true)
            #expect(kernel.log.count == writes && rig.driver(Self.gpu) == "vfio-pci")
            try Files.remove("\(proc)/42")
        }
        let ledger = GPULedger(folder: "\(rig.folder.path)/state", boot: "boot-1")
        let web = GPUOwner(domain: "web", migration: "m-1", fence: 1)
        let resource = GPUResource(function: try pci(Self.gpu))
        try ledger.reserve([resource], for: web)
        #expect(failure { try binder.recover() }?.message.contains("in use by domain web (migration m-1)") == true)
        // It is in the way of no other.
        #expect(try binder.bind([pci("0000:06:00.0")], observe: rig.observe()).count == 1)
        #expect(try binder.release([pci("0000:06:00.0")], observe: rig.observe()).count == 1)
        #expect(rig.driver(Self.gpu) == "vfio-pci" && rig.journal.contains("releasing"))
        try ledger.forget([resource], of: web)
        try binder.recover()
        #expect(drivers(rig.sysfs) == before && !rig.journal.contains(Self.gpu))
    }

    @Test func aDriverThatIsBrokenHoldsUpNobodyElse() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs, refused: [Self.audio], broken: ["snd_hda_intel"])
        let error = try #require(failure { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()) })
        #expect(error.message.contains("\(Self.audio) did not go back to snd_hda_intel: no driver has it"))
        #expect(rig.driver(Self.gpu) == "bochs-drm")
        #expect(
            failure { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()) }?.code
                == .failedPrecondition)
        #expect(try rig.binder(kernel).bind([pci("0000:06:00.0")], observe: rig.observe()).count == 1)
        #expect(failure { try rig.binder(kernel).recover() } != nil)
        // In the next boot nothing of it matters.
        let next = Binder(
            sysfs: rig.sysfs, kernel: kernel, folder: "\(rig.folder.path)/state", boot: "boot-2", loadDriver: {})
        #expect(try next.recover().isEmpty)
    }

    /// modprobe takes its time: what begins meanwhile counts.
    @Test func aUseThatBeginsWhileTheDriverIsLoaded() throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        let before = drivers(rig.sysfs)
        let driver = rig.sysfs.path("bus/pci/drivers/vfio-pci")
        try Files.remove(driver)
        let binder = Binder(sysfs: rig.sysfs, kernel: kernel, folder: "\(rig.folder.path)/state", boot: "boot-1") {
            try Files.createDirectories(driver)
        }
        var late = Surroundings()
        late.domains = [
            GPULedger.Domain(name: "late", migration: "", resources: [GPUResource(function: try pci(Self.gpu))])
        ]
        let error = failure {
            try binder.bind([pci(Self.gpu)]) {
                var tree = try rig.observe(Files.exists(driver) ? late : Surroundings())()
                tree.vfio = true
                return tree
            }
        }
        #expect(error?.code == .failedPrecondition && error?.message.contains("domain late") == true)
        #expect(drivers(rig.sysfs) == before && kernel.log.isEmpty)
    }

    @Test func concurrentCallsSerialise() async throws {
        let rig = try BindRig()
        let kernel = FixtureKernel(rig.sysfs)
        let changed = try await withThrowingTaskGroup(of: Int.self) { group in
            for _ in 0..<8 {
                group.addTask {
                    try await blocking { try rig.binder(kernel).bind([pci(Self.gpu)], observe: rig.observe()).count }
                }
            }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        #expect(changed.sorted() == [0, 0, 0, 0, 0, 0, 0, 2] && kernel.log.count == 6)
    }
}
