import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// What is written where, down to the byte.
@Suite struct PrepareWordsTests {
    static let entry = "/boot/loader/entries/a.conf"

    /// What stands behind "--" is init's.
    @Test(arguments: [
        ("root=x -- single", "root=x intel_iommu=on iommu=pt -- single"),
        ("-- iommu=pt", "intel_iommu=on iommu=pt -- iommu=pt"),
        ("a=\" -- \" b", "a=\" -- \" b intel_iommu=on iommu=pt"),
        ("intel_iommu=on iommu=pt -- intel_iommu=off", "intel_iommu=on iommu=pt -- intel_iommu=off"),
        ("x intel_iommu=off --", "x intel_iommu=on iommu=pt --"), ("x --y", "x --y intel_iommu=on iommu=pt"),
    ]) func wordsForInit(_ before: String, _ after: String) throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "\(before)\n", Self.entry: "linux /v\noptions \(before)\n"])
        try PreparedHost(root: rig.root) { _ in }.apply(rig.setup())
        #expect(rig.text("/etc/kernel/cmdline") == "\(after)\n")
        #expect(rig.text(Self.entry) == "linux /v\noptions \(after)\n")
        let setup = try rig.setup()
        #expect(setup.changes.isEmpty && setup.isMet(byRunning: "\(after)\n"))
        #expect(!setup.isMet(byRunning: "root=x -- intel_iommu=on iommu=pt\n"))
    }

    @Test func wordsForInitInSeveralLines() throws {
        let rig = try SetupRig([Self.entry: "linux /v\noptions root=x\noptions ro -- single\noptions iommu=pt\n"])
        try PreparedHost(root: rig.root) { _ in }.apply(rig.setup())
        let after = "linux /v\noptions root=x\noptions ro intel_iommu=on iommu=pt -- single\noptions iommu=pt\n"
        #expect(try rig.text(Self.entry) == after && rig.setup().changes.isEmpty)
    }

    @Test func wordsForInitInGRUB() throws {
        let main = "/etc/default/grub"
        let lines = [
            "GRUB_CMDLINE_LINUX=\"root=x -- single\"", "GRUB_CMDLINE_LINUX_DEFAULT=\"intel_iommu=on iommu=pt\"\n",
        ]
        let rig = try SetupRig(
            [main: lines.joined(separator: "\n"), "/etc/default/grub.d/50-x.cfg": "# nothing\n"],
            programs: [SetupRig.debianGRUB])
        try PreparedHost(root: rig.root, run: nil).apply(rig.setup())
        #expect(rig.text(main)?.hasPrefix("GRUB_CMDLINE_LINUX=\"root=x intel_iommu=on iommu=pt -- single\"\n") == true)
        #expect(try rig.setup().changes.isEmpty && rig.text(PrepareGRUBTests.own) == nil)
    }

    /// Its IOMMU is on, and its kernel knows neither `intel_iommu=` nor `iommu=`.
    @Test func anARM() throws {
        let folder = try TemporaryFolder("sys/class/iommu/smmu3.0x0000000200000000", "other/class/iommu/dmar0")
        let sysfs = Sysfs(root: "\(folder.path)/sys")
        #expect(isARM(sysfs, cpuinfo: nil) && isAMD(sysfs, cpuinfo: nil) == nil)
        let other = Sysfs(root: "\(folder.path)/other")
        #expect(
            !isARM(other, cpuinfo: "vendor_id : GenuineIntel\n") && isARM(other, cpuinfo: "CPU implementer : 0x41\n"))
        let rig = try SetupRig([Self.entry: "linux /v\noptions root=x\n"])
        let setup = try HostSetup(root: rig.root, devices: [], in: nil, amd: nil, arm: true)
        #expect(setup.parameters == ["iommu.passthrough=1"] && setup.notes.isEmpty)
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(setup)
        #expect(rig.text(Self.entry) == "linux /v\noptions root=x iommu.passthrough=1\n")
        try rig.write("/boot/loader/entries/new.conf", "linux /w\noptions root=x iommu.passthrough=1\n")
        #expect(try host.entriesOfOthers() == ["/boot/loader/entries/new.conf"])
    }

    /// What carries it into the boot where this program does not.
    @Test(arguments: [
        ("/usr/bin/mkinitcpio", "mkinitcpio -P)"), ("/usr/bin/dracut", "dracut --uefi)"),
        ("/usr/bin/sdbootutil", "sdbootutil mkinitrd"),
    ]) func programsForAPerson(_ program: String, _ says: String) throws {
        let rig = try SetupRig(
            ["/etc/kernel/cmdline": "root=x\n", "/efi/EFI/Linux/x.efi": "MZ"], programs: [program])
        let setup = try rig.setup()
        #expect(setup.notes.contains { $0.contains(says) }, "\(setup.notes)")
        #expect(setup.notes.contains { $0.contains("sdbootutil") } == program.contains("sdbootutil"))
        try PreparedHost(root: rig.root) { _ in }.apply(setup)
        #expect(try !rig.setup().notes.contains { $0.contains("sdbootutil") })
        // And out of it.
        let paths = setup.changes.map(\.path)
        #expect(HostSetup.notes(root: rig.root, for: paths).contains { $0.contains(says) })
    }

    /// Which of a group a VM needs is known before the boot takes it from the host.
    @Test(arguments: [true, false]) func membersOfItsGroup(_ together: Bool) throws {
        let tree = try MadeTree()
        try tree.device("0000:03:00.0", 0x10de, 0x26b9, class: 0x0302, driver: "nvidia", group: 7)
        try tree.device("0000:04:00.0", 0x144d, 0xa80a, class: 0x0108, driver: "nvme", group: 7)
        let devices = try DeviceTree(tree.sysfs)
        let chosen = together ? devices.functions : Array(devices.functions.prefix(1))
        let rig = try SetupRig([Self.entry: "linux /v\noptions root=x\n"])
        let setup = try HostSetup(root: rig.root, devices: chosen, in: devices, amd: false)
        #expect(setup.notes.contains { $0.contains("0000:04:00.0") && $0.contains("group 7") } == !together)
    }

    /// Bytes that are no UTF-8 are not written anew as something else.
    @Test(arguments: ["/etc/default/grub", entry, "/etc/kernel/cmdline"])
    func bytesOfAnotherEncoding(_ path: String) throws {
        let rig = try SetupRig(["/etc/kernel/keep": ""])
        func write(_ words: String) throws {
            let line =
                switch path {
                case Self.entry: "options root=x"
                case "/etc/default/grub": "GRUB_CMDLINE_LINUX=\"root=x"
                default: "root=x"
                }
            let text = path == "/etc/kernel/cmdline" ? "" : "# T\u{e9}st\nlinux /vmlinuz\n"
            let latin = (text + line + " name=\u{e9}" + words + (path == "/etc/default/grub" ? "\"\n" : "\n"))
                .unicodeScalars.map { UInt8($0.value) }
            try Files.createDirectories(Files.parent(of: "\(rig.root)\(path)"))
            try Files.writeAtomically(latin, to: "\(rig.root)\(path)")
        }
        try write("")
        let error = failure { try rig.setup() }
        #expect(error?.code == .failedPrecondition)
        #expect(error?.message.contains("\(path), line 1, is not in UTF-8") == true)
        #expect(error?.hint?.contains("intel_iommu=on iommu=pt") == true)
        // What has the words stays as it is.
        try write(" intel_iommu=on iommu=pt")
        #expect(try !rig.setup().changes.contains { $0.path == path })
    }

    /// Lines that end as Windows' do have an end.
    @Test func carriageReturnsInTheDifference() throws {
        let rig = try SetupRig([Self.entry: "title x\r\nlinux /v\r\noptions root=x\r\n"])
        let diff = try #require(rig.setup().changes.first { $0.path == Self.entry }?.diff)
        #expect(diff.hasSuffix("-options root=x\r\n+options root=x intel_iommu=on iommu=pt\r\n"))
        #expect(!diff.contains("No newline"))
    }

    /// mkinitcpio and kernel-install read all lines as one; what is commented out is nothing.
    @Test(arguments: [
        ("root=x rw\n# intel_iommu=on iommu=pt\n", "root=x rw intel_iommu=on iommu=pt\n# intel_iommu=on iommu=pt\n"),
        ("root=x intel_iommu=off\nrw\n", "root=x\nrw intel_iommu=on iommu=pt\n"),
        ("iommu=pt\nrw", "iommu=pt\nrw intel_iommu=on\n"), ("# none\n", "# none\nintel_iommu=on iommu=pt\n"),
        ("intel_iommu=on\niommu=pt rw", "intel_iommu=on\niommu=pt rw"), ("\n", "intel_iommu=on iommu=pt\n"),
        ("root=x\r\nrw\r\n", "root=x\r\nrw intel_iommu=on iommu=pt\r\n"),
    ]) func aCommandLineOfSeveralLines(_ before: String, _ after: String) throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": before])
        try PreparedHost(root: rig.root) { _ in }.apply(rig.setup())
        #expect(try rig.text("/etc/kernel/cmdline") == after && rig.setup().changes.isEmpty)
    }

    /// Below another root an absolute link leads into this host, whether anything is there or not.
    @Test(arguments: ["/etc/default/grub", "/etc/kernel", "/boot/efi/loader/entries", "/boot", entry])
    func linksOutOfTheRoot(_ path: String) throws {
        let rig = try SetupRig(["/etc/keep": ""])
        let link = "\(rig.root)\(path)"
        try Files.createDirectories(Files.parent(of: link))
        try #require(symlink("/nowhere/at/all", link) == 0)
        let error = failure { try rig.setup() }
        #expect(error?.code == .failedPrecondition)
        #expect(error?.message.contains("\(link) is a link to /nowhere/at/all") == true, "\(error?.message ?? "")")
        #expect(error?.hint?.contains("relative") == true)
    }

    /// A command line that nobody reads is no boot that is prepared.
    @Test func nothingThatBoots() throws {
        let line = "/etc/kernel/cmdline"
        for (path, program) in [("/etc/default/grub", ""), (Self.entry, ""), ("/x", "/usr/sbin/proxmox-boot-tool")] {
            let rig = try SetupRig(
                [line: "root=x\n", path: path == Self.entry ? PrepareTests.entry : PrepareTests.grub],
                programs: program.isEmpty ? [] : [program])
            #expect(try !rig.setup().notes.contains { $0.contains("nothing was found that boots by it") })
        }
        let notes = try SetupRig([line: "root=x\n"]).setup().notes
        #expect(notes.contains { $0.contains("nothing was found that boots by it") })
    }

    /// Of an OSTree system dracut can't make the initramfs that is booted.
    @Test func anImageBasedSystem() throws {
        let files = [Self.entry: PrepareTests.entry, "/ostree/repo/config": ""]
        let rig = try SetupRig(files, programs: ["/usr/bin/dracut"])
        let setup = try rig.setup(["0000:01:00.0"])
        #expect(setup.commands.isEmpty && setup.notes.contains { $0.contains("rpm-ostree initramfs --enable") })
        #expect(try !rig.setup().notes.contains { $0.contains("rpm-ostree") })
        let paths = setup.changes.map(\.path)
        #expect(HostSetup.notes(root: rig.root, for: paths).contains { $0.contains("rpm-ostree") })
    }

    /// Debian's dracut comes with an update-initramfs, which knows no hooks of initramfs-tools.
    @Test func dracutsUpdateInitramfs() throws {
        let programs = ["/usr/sbin/update-initramfs", "/usr/bin/dracut"]
        for isDracut in [true, false] {
            let rig = try SetupRig(
                [Self.entry: PrepareTests.entry], programs: programs + (isDracut ? [] : ["/usr/sbin/mkinitramfs"]))
            let setup = try rig.setup(["0000:01:00.0"])
            #expect(setup.changes.contains { $0.path.hasPrefix("/etc/dracut.conf.d/") } == isDracut)
            #expect(setup.changes.contains { $0.path.hasPrefix("/etc/initramfs-tools/") } == !isDracut)
            #expect(setup.commands == [["/usr/sbin/update-initramfs", "-u", "-k", "all"]])
        }
    }

    /// What the firmware calls it.
    @Test func anARMWithoutItsIOMMU() throws {
        let tree = try MadeTree(iommu: false)
        func remedy() throws -> String? {
            let found = try checkDevices([pci("0000:03:00.0")], vgpu: nil, in: DeviceTree(tree.sysfs))
            return found.first { $0.requirement == "IOMMU" && $0.verdict == .fail }?.remedy
        }
        #expect(try remedy()?.contains("VT-d or AMD-Vi") == true)
        try Files.createDirectories(tree.sysfs.path("devices/system/cpu/cpu0/regs/identification/midr_el1"))
        #expect(try remedy()?.contains("SMMU") == true && remedy()?.contains("VT-d") == false)
        var profile = HostProfile()
        profile.kernel = "6.1.0-28-arm64"
        #expect(profile.iommuRemedy.contains("SMMU") && !profile.iommuRemedy.contains("VT-d"))
        #expect(HostProfile().iommuRemedy.contains("SMMU") && HostProfile().iommuRemedy.contains("AMD-Vi"))
    }

    /// Each line ends as it did.
    @Test(arguments: [
        ("/boot/loader/entries/a.conf", "title a\r\nlinux /a\noptions x\r\nversion 1\n", "x"),
        ("/boot/loader/entries/a.conf", "title a\nlinux /a\r\n", ""),
        ("/etc/kernel/cmdline", "# ours\r\nroot=a\nx\r\n", "x"),
    ]) func mixedLineEnds(_ path: String, _ before: String, _ last: String) throws {
        let rig = try SetupRig([path: before])
        try PreparedHost(root: rig.root) { _ in }.apply(rig.setup())
        let added = "intel_iommu=on iommu=pt"
        let after = last.isEmpty ? "\(before)options \(added)\n" : before.replacing("x\r\n", with: "x \(added)\r\n")
        #expect(rig.text(path) == after)
        #expect(try rig.setup().changes.isEmpty)
    }
}
