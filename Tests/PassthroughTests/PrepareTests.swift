import FlotillaProtocol
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// Files of a host that is not this one.
struct SetupRig {
    let folder: TemporaryFolder
    var root: String { "\(folder.path)/root" }

    /// Debian's reads drop-ins, by a line like that of its own.
    static let debianGRUB = "/usr/sbin/grub-mkconfig"

    init(_ files: [String: String], programs: [String] = []) throws {
        folder = try TemporaryFolder("root")
        for (path, text) in files { try write(path, text) }
        for program in programs {
            let isDebian = program == Self.debianGRUB
            try write(program, isDebian ? "for x in ${sysconfdir}/default/grub.d/*.cfg ; do\n" : "")
            try #require(Program.run("/usr/bin/chmod", ["755", "\(root)\(program)"]).status == 0)
        }
    }

    func write(_ path: String, _ text: String) throws {
        try Files.createDirectories(Files.parent(of: "\(root)\(path)"))
        try Files.writeAtomically(Array(text.utf8), to: "\(root)\(path)", mode: 0o640)
    }

    func text(_ path: String) -> String? {
        (try? Files.read("\(root)\(path)")).map { String(decoding: $0, as: UTF8.self) }
    }

    func tree() throws -> DeviceTree {
        let sysfs = try folder.sub("sys")
        if !Files.exists("\(sysfs)/bus") { try unpackRecordedMachine(to: sysfs) }
        return try DeviceTree(Sysfs(root: sysfs))
    }

    func setup(_ addresses: [String] = [], amd: Bool = false) throws -> HostSetup {
        let tree = try tree()
        let devices = try addresses.flatMap { tree.together(with: try pci($0)) }
        return try HostSetup(root: root, devices: devices, in: tree, amd: amd)
    }

    /// Every folder, and every file with its bytes and mode.
    func snapshot() throws -> [String] {
        let outcome = try Program.run(
            "/usr/bin/find",
            [
                root, "-type", "d", "-printf", "%P/\\n", "-o", "-type", "f", "-printf", "%P %m ", "-exec", "md5sum",
                "{}",
                ";",
            ])
        return outcome.output.split(separator: "\n").map(String.init).sorted()
    }
}

@Suite struct PrepareTests {
    static let grub = "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"\"\n"
    static let entry = "title Linux\nlinux /vmlinuz\noptions root=/dev/sda1 ro quiet\n"

    @Test func debianWithADeviceThereAndBack() throws {
        let rig = try SetupRig(
            ["/etc/default/grub": Self.grub, "/etc/default/grub.d/init.cfg": "# nothing\n"],
            programs: [SetupRig.debianGRUB, "/usr/sbin/update-grub", "/usr/sbin/update-initramfs"])
        let ran = Mutex<[[String]]>([])
        let host = PreparedHost(root: rig.root) { command in ran.withLock { $0.append(command) } }
        let before = try rig.snapshot()
        let setup = try rig.setup(["0000:01:00.0"])
        #expect(try rig.snapshot() == before)
        try host.apply(setup)
        #expect(ran.withLock { $0 } == [["/usr/sbin/update-grub"], ["/usr/sbin/update-initramfs", "-u", "-k", "all"]])
        #expect(
            rig.text("/etc/default/grub.d/90-flotilla-gpu.cfg")?.contains(
                "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on iommu=pt\"") == true)
        let rules = try #require(rig.text("/etc/udev/rules.d/10-flotilla-vfio.rules"))
        #expect(
            rules.contains(
                "KERNEL==\"0000:01:00.0\", ATTR{vendor}==\"0x1234\", ATTR{device}==\"0x1111\", ATTR{driver_override}=\"vfio-pci\""
            ))
        #expect(rules.contains("KERNEL==\"0000:01:00.1\""))
        // The GPU's id goes as a whole; the audio function has a twin in the boot display's slot.
        let modprobe = try #require(rig.text("/etc/modprobe.d/flotilla-vfio.conf"))
        #expect(
            modprobe.contains("options vfio-pci ids=1234:1111\n")
                && modprobe.contains("softdep bochs pre: vfio-pci"))
        #expect(rig.text("/etc/initramfs-tools/hooks/flotilla-vfio")?.hasPrefix("#!/bin/sh\n") == true)

        let again = try rig.setup(["0000:01:00.0"])
        #expect(again.changes.isEmpty && again.commands.isEmpty)
        try host.apply(again)
        #expect(ran.withLock { $0.count } == 2)
        try host.revert(commands: HostSetup.commands(root: rig.root, for: host.reverting().map(\.path)))
        #expect(try rig.snapshot() == before)
        #expect(ran.withLock { $0.count } == 4)
        #expect(try host.reverting().isEmpty)
    }

    struct Loader: Sendable, CustomTestStringConvertible {
        var testDescription: String
        var path: String
        var before: String
        var after: String
        var amd = false
    }

    static let loaders = [
        Loader(
            testDescription: "GRUB without drop-ins", path: "/etc/default/grub", before: grub,
            after: grub.replacing("LINUX=\"\"", with: "LINUX=\"intel_iommu=on iommu=pt\"")),
        Loader(
            testDescription: "single quotes, AMD", path: "/etc/default/grub", before: "GRUB_CMDLINE_LINUX='a b'\n",
            after: "GRUB_CMDLINE_LINUX='a b iommu=pt'\n", amd: true),
        Loader(
            testDescription: "no assignment", path: "/etc/default/grub", before: "GRUB_DEFAULT=0",
            after: "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on iommu=pt\"\n"),
        Loader(
            testDescription: "what undoes it goes", path: "/etc/default/grub",
            before: "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet intel_iommu=off\"\nGRUB_CMDLINE_LINUX=\"\"\n",
            after: "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n"),
        Loader(
            testDescription: "a comment stays", path: "/etc/default/grub",
            before: "GRUB_CMDLINE_LINUX_DEFAULT='quiet splash'  # keep\nGRUB_CMDLINE_LINUX=\"a\"\t# and this\n",
            after:
                "GRUB_CMDLINE_LINUX_DEFAULT='quiet splash'  # keep\n"
                + "GRUB_CMDLINE_LINUX=\"a intel_iommu=on iommu=pt\"\t# and this\n"),
        Loader(
            testDescription: "half there", path: "/etc/default/grub", before: "GRUB_CMDLINE_LINUX=\"iommu=pt x\"\n",
            after: "GRUB_CMDLINE_LINUX=\"iommu=pt x intel_iommu=on\"\n"),
        Loader(
            testDescription: "there", path: "/etc/default/grub",
            before: "GRUB_CMDLINE_LINUX_DEFAULT=\"intel_iommu=on iommu=pt\"\n",
            after: "GRUB_CMDLINE_LINUX_DEFAULT=\"intel_iommu=on iommu=pt\"\n"),
        Loader(
            testDescription: "the last of two counts", path: "/etc/default/grub",
            before: "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\nGRUB_CMDLINE_LINUX=\"root=x\"\n",
            after: "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n"
                + "GRUB_CMDLINE_LINUX=\"root=x intel_iommu=on iommu=pt\"\n"),
        Loader(
            testDescription: "the last of two has the first", path: "/etc/default/grub",
            before: "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX a\"\n",
            after: "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX a\"\n"),
        Loader(
            testDescription: "BLS entry", path: "/boot/loader/entries/fedora.conf", before: entry,
            after: entry.replacing("ro quiet", with: "ro quiet intel_iommu=on iommu=pt")),
        Loader(
            testDescription: "BLS entry with kernelopts", path: "/boot/loader/entries/rhel.conf",
            before: "linux /vmlinuz\noptions $kernelopts $tuned_params\n",
            after: "linux /vmlinuz\noptions $kernelopts $tuned_params intel_iommu=on iommu=pt\n"),
        Loader(
            testDescription: "an entry of Windows", path: "/boot/efi/loader/entries/windows.conf",
            before: "title Windows\nefi /EFI/Microsoft/Boot/bootmgfw.efi\n",
            after: "title Windows\nefi /EFI/Microsoft/Boot/bootmgfw.efi\n"),
        Loader(
            testDescription: "indented, with carriage returns", path: "/boot/efi/loader/entries/hand.conf",
            before: "linux /vmlinuz\r\n  options root=x intel_iommu=off\r\n",
            after: "linux /vmlinuz\r\n  options root=x intel_iommu=on iommu=pt\r\n"),
        Loader(
            testDescription: "without options", path: "/boot/efi/loader/entries/bare.conf", before: "linux /vmlinuz\n",
            after: "linux /vmlinuz\noptions intel_iommu=on iommu=pt\n"),
        Loader(
            testDescription: "systemd-boot, two options lines", path: "/boot/efi/loader/entries/arch.conf",
            before: "linux /vmlinuz\noptions iommu=pt root=x\noptions rw\n",
            after: "linux /vmlinuz\noptions iommu=pt root=x\noptions rw intel_iommu=on\n"),
        Loader(
            testDescription: "kernel-install", path: "/etc/kernel/cmdline", before: "root=x rw\n",
            after: "root=x rw intel_iommu=on iommu=pt\n"),
    ]

    @Test(arguments: loaders) func editsBootLoaders(_ loader: Loader) throws {
        let rig = try SetupRig([loader.path: loader.before])
        let before = try rig.snapshot()
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup(amd: loader.amd))
        #expect(rig.text(loader.path) == loader.after)
        #expect(try rig.setup(amd: loader.amd).changes.isEmpty)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// A folder that somebody put something into stays, with that; one that was there before stays empty.
    @Test func foldersGoAsTheyCame() throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n"])
        try Files.createDirectories("\(rig.root)/etc/modprobe.d")
        let before = try rig.snapshot()
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup())
        // Later, with more to do: what the first run made is remembered.
        try host.apply(rig.setup(["0000:01:00.0"]))
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)

        try host.apply(rig.setup(["0000:01:00.0"]))
        try rig.write("/etc/udev/rules.d/20-site.rules", "# ours\n")
        try host.revert(commands: [])
        #expect(rig.text("/etc/udev/rules.d/20-site.rules") == "# ours\n")
        let folders = try rig.snapshot().filter { $0.hasSuffix("/") }
        #expect(folders == ["/", "etc/", "etc/kernel/", "etc/modprobe.d/", "etc/udev/", "etc/udev/rules.d/"])
    }

    /// modprobe knows modules, and drivers have other names.
    @Test func modulesComeAfterVfioByTheirOwnNames() throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n"])
        let modprobe = "/etc/modprobe.d/flotilla-vfio.conf"
        func lines(_ setup: HostSetup) -> [String] {
            let bytes = setup.changes.first { $0.path == modprobe }?.after ?? []
            return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map(String.init)
        }
        let named = try lines(rig.setup(["0000:01:00.0"]))
        #expect(named.contains("softdep bochs pre: vfio-pci") && !named.contains { $0.contains("bochs-drm") })
        // Built in: it comes before any rule, and is told.
        let module = try #require(rig.tree().sysfs.linkName("bus/pci/drivers/bochs-drm/module"))
        try Files.createDirectories("\(rig.folder.path)/sys/module/\(module)")
        #expect(try rig.setup(["0000:01:00.0"]).notes.contains { $0.contains("bochs-drm is built into the kernel") })
        try Files.writeAtomically([], to: "\(rig.folder.path)/sys/module/\(module)/initstate")
        #expect(try !rig.setup(["0000:01:00.0"]).notes.contains { $0.contains("is built into") })
        // There is nothing to order, and nothing else it could be called.
        try Files.remove("\(rig.folder.path)/sys/bus/pci/drivers/bochs-drm/module")
        #expect(try lines(rig.setup(["0000:01:00.0"])).contains("softdep bochs-drm pre: vfio-pci"))
    }

    @Test func nothingPreparedIsNothingToTakeBack() throws {
        let rig = try SetupRig(["/etc/default/grub": Self.grub])
        let before = try rig.snapshot()
        try PreparedHost(root: rig.root) { _ in }.revert(commands: [["/bin/false"]])
        #expect(try rig.snapshot() == before)
    }

    @Test func saysWhatItCantDo() throws {
        #expect(failure { try SetupRig([:]).setup() }?.message.contains("no boot loader") == true)
        let shell = try SetupRig(["/etc/default/grub": "GRUB_CMDLINE_LINUX=\"`cat x`\"\n"])
        #expect(failure { try shell.setup() }?.message.contains("can't edit") == true)
    }

    /// A new assignment behind one of these would replace it; a drop-in adds to it.
    @Test(arguments: [
        "  GRUB_CMDLINE_LINUX=\"root=x\"\n", "export GRUB_CMDLINE_LINUX=\"root=x\"\n",
        "GRUB_CMDLINE_LINUX+=\" root=x\"\n",
        "GRUB_CMDLINE_LINUX=\"a\"\n\texport GRUB_CMDLINE_LINUX_DEFAULT+=\" intel_iommu=on iommu=pt\"\n",
    ])
    func oddAssignmentsAreLeftAlone(_ text: String) throws {
        let main = "/etc/default/grub"
        let rig = try SetupRig([main: text])
        let before = try rig.snapshot()
        let error = failure { try PreparedHost(root: rig.root) { _ in }.apply(rig.setup()) }
        #expect(error?.code == .failedPrecondition && error?.message.contains("can't edit") == true)
        #expect(try rig.snapshot() == before)

        let debian = try SetupRig(
            [main: text, "/etc/default/grub.d/init.cfg": "# GRUB_CMDLINE_LINUX+=x\n"], programs: [SetupRig.debianGRUB])
        try PreparedHost(root: debian.root) { _ in }.apply(debian.setup())
        #expect(debian.text(main) == text)
        #expect(
            debian.text("/etc/default/grub.d/90-flotilla-gpu.cfg")?.contains(
                "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX intel_iommu=on iommu=pt\"\n") == true)
    }

    /// Files are read one after the other: a drop-in replaces what it does not name.
    @Test func dropInsReplaceWhatWasBefore() throws {
        let set = "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n"
        let rig = try SetupRig(
            ["/etc/default/grub": set, "/etc/default/grub.d/50-x.cfg": "GRUB_CMDLINE_LINUX='a'\n"],
            programs: [SetupRig.debianGRUB])
        let own = "/etc/default/grub.d/90-flotilla-gpu.cfg"
        #expect(try rig.setup().changes.contains { $0.path == own })
        try rig.write("/etc/default/grub.d/50-x.cfg", "GRUB_CMDLINE_LINUX=\"${GRUB_CMDLINE_LINUX} a\"\n")
        #expect(try !rig.setup().changes.contains { $0.path == own })
        // What undoes it is not overlooked, however it is written.
        try rig.write("/etc/default/grub.d/50-x.cfg", "export GRUB_CMDLINE_LINUX+=\" intel_iommu=off\"\n")
        #expect(failure { try rig.setup() }?.message.contains("can't edit") == true)
    }

    /// What is read after our own file can take away what that adds; and can be mended by hand.
    @Test(arguments: ["GRUB_CMDLINE_LINUX=\"a\"\n", "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX iommu=off\"\n"])
    func dropInsThatComeAfterOurs(_ text: String) throws {
        let late = "/etc/default/grub.d/99-site.cfg"
        let rig = try SetupRig(
            ["/etc/default/grub": Self.grub, "/etc/default/grub.d/init-select.cfg": "# nothing\n", late: text],
            programs: [SetupRig.debianGRUB])
        let before = try rig.snapshot()
        let error = failure { try PreparedHost(root: rig.root) { _ in }.apply(rig.setup()) }
        #expect(error?.code == .failedPrecondition, "\(error?.message ?? "none")")
        if !text.contains("off") { #expect(error?.message.contains("\(late) is read after") == true) }
        #expect(try rig.snapshot() == before)
        try rig.write(late, "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX a\"\n")
        try PreparedHost(root: rig.root) { _ in }.apply(rig.setup())
        #expect(try rig.setup().changes.isEmpty)
        // One that came later is noticed by the next run.
        try rig.write(late, text)
        #expect(failure { try rig.setup() }?.code == .failedPrecondition)
    }

    /// The recorded machine's devices, with uses that it did not have.
    @Test func whatTheHostUsesIsNotPrepared() throws {
        let rig = try SetupRig([:])
        let sysfs = try rig.folder.sub("sys")
        try unpackRecordedMachine(to: sysfs)
        var tree = try DeviceTree(Sysfs(root: sysfs))
        func prepare(_ address: String, _ use: DeviceUse?, _ consent: Consent = []) throws -> [String] {
            let index = try #require(tree.functions.firstIndex { $0.function.address == address })
            tree.functions[index].uses = use.map { [$0] } ?? []
            return try devicesToPrepare([pci(address)], in: tree, consent: consent).map(\.function.address)
        }
        let nic = "0000:06:00.0"
        let free = try prepare(nic, nil)
        #expect(free == [nic])
        for (use, consent) in [
            (DeviceUse(.disk, "a mounted file system on sda1"), nil),
            (DeviceUse(.vgpu, "a vGPU of type 558"), nil),
            (DeviceUse(.network, "network interface eth0, which is up"), Consent.use),
            (DeviceUse(.process, "process 42 (Xorg)"), .use),
            (DeviceUse(.console, "the kernel's console on fb0"), .console),
        ] {
            let refused = failure { try prepare(nic, use) }
            #expect(refused?.code == .failedPrecondition && refused?.message.contains("in use by \(use.by)") == true)
            let all: Consent = [.group, .console, .bootVGA, .use]
            if let consent {
                #expect(try prepare(nic, use, consent) == free)
            } else {
                #expect(failure { try prepare(nic, use, all) } != nil, "\(use.by)")
            }
        }
        // A VM that has it gets it after the boot too.
        #expect(try prepare(nic, DeviceUse(.domain, "domain web")) == free)
        #expect(failure { try prepare("0000:0b:00.0", nil) }?.message.contains("boot_vga") == true)
        #expect(failure { try prepare("0000:00:1f.0", nil) }?.message.contains("bridge") == true)
        #expect(failure { try prepare("0000:03:00.1", nil) }?.message.contains("is not there at boot") == true)
        #expect(
            failure { try devicesToPrepare([pci("0000:7f:00.0")], in: tree, consent: []) }?.code == .failedPrecondition)
    }

    /// Nothing of this machine's when the tree is another's.
    @Test func theMakerOfTheCPU() throws {
        let folder = try TemporaryFolder("sys/bus/pci/devices/0000:00:00.0", "sys/class/iommu")
        let sysfs = Sysfs(root: "\(folder.path)/sys")
        func put(_ name: String, _ text: String) throws {
            try Files.writeAtomically(Array(text.utf8), to: sysfs.path("bus/pci/devices/0000:00:00.0/\(name)"))
        }
        try put("vendor", "0x1b36\n")
        #expect(isAMD(sysfs, cpuinfo: nil) == nil)
        #expect(isAMD(sysfs, cpuinfo: "vendor_id : AuthenticAMD\n") == true)
        #expect(isAMD(sysfs, cpuinfo: "vendor_id : GenuineIntel\n") == false)
        try Files.createDirectories(sysfs.path("class/iommu/ivhd0"))
        #expect(isAMD(sysfs, cpuinfo: nil) == true)
        try put("vendor", "0x8086\n")
        #expect(isAMD(sysfs, cpuinfo: "AuthenticAMD") == false)
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n", "/efi/loader/entries/a.conf": Self.entry])
        let unknown = try HostSetup(root: rig.root, devices: [], in: nil, amd: nil)
        #expect(unknown.parameters == ["intel_iommu=on", "iommu=pt"] && unknown.notes.count == 1)
    }

    @Test func othersChangesAreNotOverwritten() throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n"])
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup())
        try rig.write("/etc/kernel/cmdline", "root=y intel_iommu=on iommu=pt\n")
        let error = failure { try host.revert(commands: []) }
        #expect(error?.code == .failedPrecondition && error?.message.contains("/etc/kernel/cmdline") == true)
        #expect(rig.text("/etc/modules-load.d/flotilla-vfio.conf") != nil)
    }

    @Test func aFailedProgramIsRunAgain() throws {
        let rig = try SetupRig(["/etc/default/grub": Self.grub], programs: ["/usr/sbin/update-grub"])
        let failing = PreparedHost(root: rig.root) { _ in throw MigrationError(.internal, "disk full") }
        #expect(failure { try failing.apply(rig.setup()) }?.message == "disk full")
        let ran = Mutex(0)
        let host = PreparedHost(root: rig.root) { _ in ran.withLock { $0 += 1 } }
        #expect(try host.pending() == [["/usr/sbin/update-grub"]])
        try host.apply(rig.setup())
        #expect(ran.withLock { $0 } == 1)
        #expect(try host.pending().isEmpty)
    }

    /// patch(1) is the judge.
    @Test(arguments: [
        ("a\nb\nc\n", "a\nB\nc\n"), ("a\nb", "a\nb\n"), ("", "x\n"),
        (
            "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\n15\n16\n",
            "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\nx\n16\n"
        ),
        ("x\n\n\ny\n", "\nx\n\ny\nz"), ("a\r\nb\r\nc\r", "a\r\nB\r\nc"),
    ])
    func differencesApply(_ before: String, _ after: String) throws {
        let folder = try TemporaryFolder()
        let diff = unifiedDiff("file", before: Array(before.utf8), after: Array(after.utf8))
        try Files.writeAtomically(Array(before.utf8), to: "\(folder.path)/file")
        try Files.writeAtomically(Array(diff.utf8), to: "\(folder.path)/diff")
        let outcome = try Program.run(
            "/usr/bin/patch", ["-s", "-d", folder.path, "-i", "\(folder.path)/diff", "file"])
        #expect(outcome.status == 0, "\(outcome.output)\(diff)")
        #expect(try Files.read("\(folder.path)/file") == Array(after.utf8))
    }
}
