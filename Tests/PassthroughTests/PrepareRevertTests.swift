import Glibc
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

@Suite struct PrepareRevertTests {
    /// Whoever comes while one is at work changes nothing.
    @Test func oneProcessAtATime() throws {
        let rig = try SetupRig(
            ["/etc/default/grub": PrepareTests.grub], programs: ["/usr/sbin/update-grub", "/usr/sbin/update-initramfs"])
        let before = try rig.snapshot()
        let (plain, withDevice) = (try rig.setup(), try rig.setup(["0000:01:00.0"]))
        let refused = Mutex<[MigrationError?]>([])
        let second = PreparedHost(root: rig.root) { _ in }
        let first = PreparedHost(root: rig.root) { _ in
            let errors = [failure { try second.apply(withDevice) }, failure { try second.revert(commands: []) }]
            refused.withLock { $0 += errors }
        }
        try first.apply(plain)
        let errors = refused.withLock { $0 }
        #expect(errors.count == 2)
        for error in errors {
            #expect(
                error?.code == .failedPrecondition && error?.message.contains("another `flotilla gpu prepare`") == true)
        }
        // Made before the other was done: it would take that one's words away.
        let stale = failure { try second.apply(withDevice) }
        #expect(
            stale?.code == .failedPrecondition && stale?.message.contains("changed by somebody else just now") == true)
        #expect(rig.text("/etc/udev/rules.d/10-flotilla-vfio.rules") == nil)
        try second.apply(rig.setup(["0000:01:00.0"]))
        #expect(rig.text("/etc/udev/rules.d/10-flotilla-vfio.rules") != nil)
        try second.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// Kernels come and go between prepare and --revert.
    @Test func entriesOfOtherKernels() throws {
        let folder = "/boot/loader/entries"
        let rig = try SetupRig([
            "\(folder)/6.1.conf": PrepareTests.entry, "\(folder)/6.2.conf": PrepareTests.entry,
            "/etc/kernel/cmdline": "root=x\n",
        ])
        let host = PreparedHost(root: rig.root) { _ in }
        #expect(try host.entriesOfOthers().isEmpty)
        try host.apply(rig.setup())
        #expect(try host.entriesOfOthers().isEmpty)
        let written = try #require(rig.text("\(folder)/6.2.conf"))
        try Files.remove("\(rig.root)\(folder)/6.1.conf")
        try Files.remove("\(rig.root)/etc/kernel/cmdline")
        try rig.write("\(folder)/6.3.conf", written)
        try rig.write("\(folder)/memtest.conf", "title intel_iommu=on\noptions quiet\n")
        #expect(try host.entriesOfOthers() == ["\(folder)/6.3.conf"])
        try host.revert(commands: [])
        #expect(rig.text("\(folder)/6.1.conf") == nil && rig.text("\(folder)/6.2.conf") == PrepareTests.entry)
        #expect(rig.text("\(folder)/6.3.conf") == written)
        // Any other file that is gone comes back.
        #expect(rig.text("/etc/kernel/cmdline") == "root=x\n")
    }

    /// Prepared twice, with a change of somebody else's between: that is what comes back.
    @Test func whatOthersWroteBetweenComesBack() throws {
        let path = "/boot/loader/entries/a.conf"
        let rig = try SetupRig([path: "linux /a\noptions root=old\n"])
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup())
        try rig.write(path, "linux /a\noptions root=new\n")
        try host.apply(rig.setup())
        #expect(rig.text(path)?.contains("root=new intel_iommu=on") == true)
        try host.revert(commands: [])
        #expect(rig.text(path) == "linux /a\noptions root=new\n")
    }

    /// Files of its own go, whatever somebody wrote into them between two runs.
    @Test func itsOwnFilesGo() throws {
        let rules = "/etc/udev/rules.d/10-flotilla-vfio.rules"
        let rig = try SetupRig(
            ["/etc/default/grub": PrepareTests.grub, "/etc/default/grub.d/50-x.cfg": ""],
            programs: [SetupRig.debianGRUB])
        let host = PreparedHost(root: rig.root) { _ in }
        let before = try rig.snapshot()
        try host.apply(rig.setup(["0000:01:00.0"]))
        let written = try #require(rig.text(rules))
        try rig.write(rules, written.replacing("\nACTION", with: "\n#ACTION"))
        try rig.write(PrepareGRUBTests.own, "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX hugepages=8\"\n")
        #expect(failure { try host.revert(commands: []) }?.message.contains("changed by somebody else since") == true)
        try host.apply(rig.setup(["0000:09:00.0"]))
        #expect(rig.text(rules)?.contains("0000:09:00.0") == true)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// What was prepared for one device stays when another is.
    @Test func devicesPreparedBeforeStay() throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n"])
        let host = PreparedHost(root: rig.root) { _ in }
        let before = try rig.snapshot()
        try host.apply(rig.setup(["0000:01:00.0"]))
        let second = try rig.setup(["0000:09:00.0"])
        #expect(second.notes.contains { $0.contains("0000:01:00.0, 0000:01:00.1") })
        try host.apply(second)
        let rules = try #require(rig.text("/etc/udev/rules.d/10-flotilla-vfio.rules"))
        for address in ["0000:01:00.0", "0000:01:00.1", "0000:09:00.0"] {
            #expect(rules.contains("KERNEL==\"\(address)\""))
        }
        for address in ["0000:01:00.0", "0000:09:00.0"] { #expect(try rig.setup([address]).changes.isEmpty) }
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// Debian's hook of systemd-boot has kernel-install write the entries anew, of the running kernel's command line where
    /// there is no file for it.
    @Test func kernelInstallKeepsTheWords() throws {
        let path = "/boot/efi/loader/entries/6.1.conf"
        let hook = "/etc/initramfs/post-update.d/systemd-boot"
        let programs = [hook, "/usr/sbin/update-initramfs"]
        let rig = try SetupRig([path: "linux /a\noptions root=x ro\n"], programs: programs)
        let kernelInstall: @Sendable ([String]) throws -> Void = { [root = rig.root] _ in
            let line = (try? Files.read("\(root)/etc/kernel/cmdline")).map { String(decoding: $0, as: UTF8.self) }
            try Files.writeAtomically(
                Array("linux /b\noptions \(line ?? "root=running\n")".utf8), to: "\(root)\(path)", mode: 0o640)
        }
        let before = try rig.snapshot()
        let host = PreparedHost(root: rig.root, run: kernelInstall)
        try host.apply(rig.setup(["0000:01:00.0"]))
        #expect(rig.text(path) == "linux /b\noptions root=x ro intel_iommu=on iommu=pt\n")
        #expect(try rig.setup(["0000:01:00.0"]).changes.isEmpty)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// Whatever programs write boot entries from: it is not prepared when the words are gone afterwards.
    @Test func wordsThatProgramsTakeAwayAreMissed() throws {
        let path = "/boot/loader/entries/a.conf"
        let rig = try SetupRig([path: "linux /a\noptions root=x\n"], programs: ["/usr/sbin/update-initramfs"])
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            try Files.writeAtomically(Array("linux /a\noptions root=x\n".utf8), to: "\(root)\(path)", mode: 0o640)
        }
        let error = failure { try host.apply(rig.setup(["0000:01:00.0"])) }
        #expect(error?.code == .internal && error?.message.contains(path) == true)
        #expect(error?.hint?.contains("intel_iommu=on iommu=pt") == true)
        #expect(try !rig.setup(["0000:01:00.0"]).changes.isEmpty)
    }

    /// A program that failed is tried again by a run that has no more to change: what it writes then counts as well, also
    /// entries that had the words before or were not there.
    @Test(arguments: ["a", "b", "c"]) func wordsThatAnotherTryTakesAway(_ name: String) throws {
        let folder = "/boot/loader/entries"
        let rig = try SetupRig(
            [
                "\(folder)/a.conf": "linux /a\noptions root=x\n",
                "\(folder)/b.conf": "linux /b\noptions root=x intel_iommu=on iommu=pt\n",
            ], programs: ["/usr/sbin/update-initramfs"])
        let failing = PreparedHost(root: rig.root) { _ in throw MigrationError(.internal, "disk full") }
        #expect(failure { try failing.apply(rig.setup(["0000:01:00.0"])) }?.message == "disk full")
        let setup = try rig.setup(["0000:01:00.0"])
        #expect(setup.changes.isEmpty)
        let path = "\(folder)/\(name).conf"
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            try Files.writeAtomically(Array("linux /a\noptions root=x\n".utf8), to: "\(root)\(path)", mode: 0o640)
        }
        let error = failure { try host.apply(setup) }
        #expect(error?.code == .internal && error?.message.contains(path) == true)
        #expect(error?.message.contains("update-initramfs") == true)
    }

    @Test func proxmoxCarriesItToItsPartitions() throws {
        let rig = try SetupRig(["/etc/kernel/cmdline": "root=x\n"], programs: ["/usr/sbin/proxmox-boot-tool"])
        #expect(try rig.setup().commands == [["/usr/sbin/proxmox-boot-tool", "refresh"]])
    }

    /// Below another root as on this host; never out of it.
    @Test func aLinkStaysALink() throws {
        let rig = try SetupRig(["/usr/share/grub": PrepareTests.grub, "/etc/default/other": ""])
        let link = "\(rig.root)/etc/default/grub"
        try #require(symlink("../../usr/share/grub", link) == 0)
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup())
        #expect(rig.text("/usr/share/grub")?.contains("intel_iommu=on") == true)
        try host.revert(commands: [])
        #expect(
            rig.text("/usr/share/grub") == PrepareTests.grub
                && Sysfs(root: rig.root).linkPath("etc/default/grub") != nil)

        try Files.writeAtomically(Array(PrepareTests.grub.utf8), to: "\(rig.folder.path)/outside")
        try Files.remove(link)
        try #require(symlink("\(rig.folder.path)/outside", link) == 0)
        #expect(failure { try host.apply(rig.setup()) }?.message.contains("leads out of") == true)
        #expect(try Files.read("\(rig.folder.path)/outside") == Array(PrepareTests.grub.utf8))

        // It is seen before the first file is written.
        let later = try SetupRig(["/etc/default/grub": PrepareTests.grub, "/etc/kernel/keep": ""])
        try Files.writeAtomically(Array("root=x\n".utf8), to: "\(later.folder.path)/outside")
        try #require(symlink("\(later.folder.path)/outside", "\(later.root)/etc/kernel/cmdline") == 0)
        let before = try later.snapshot()
        let error = failure { try PreparedHost(root: later.root) { _ in }.apply(later.setup()) }
        #expect(try error?.code == .failedPrecondition && later.snapshot() == before)
    }
}
