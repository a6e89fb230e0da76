import Glibc
import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// Which of GRUB's files count, and whether what is made of them has the words.
@Suite struct PrepareGRUBTests {
    static let main = "/etc/default/grub"
    static let own = "/etc/default/grub.d/90-flotilla-gpu.cfg"
    static let made = "/boot/grub/grub.cfg"

    /// GRUB's own grub-mkconfig reads no drop-ins, whatever lies there.
    @Test func aFolderThatNobodyReads() throws {
        let words = "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n"
        let rig = try SetupRig(
            [Self.main: PrepareTests.grub, "/etc/default/grub.d/50-x.cfg": words], programs: ["/usr/bin/grub-mkconfig"])
        let before = try rig.snapshot()
        let host = PreparedHost(root: rig.root) { _ in }
        let setup = try rig.setup()
        #expect(setup.changes.map(\.path).contains(Self.main) && !setup.changes.contains { $0.path == Self.own })
        #expect(setup.commands == [["/usr/bin/grub-mkconfig", "-o", Self.made]])
        try host.apply(setup)
        #expect(rig.text(Self.main)?.contains(words) == true)
        #expect(try rig.setup().changes.isEmpty)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// A library of grub-mkconfig's, or the settings themselves, read it too.
    @Test(arguments: ["/usr/share/grub/grub-mkconfig_lib", main]) func whoeverReadsTheFolder(_ reader: String) throws {
        let line = "for f in /etc/default/grub.d/*.cfg; do . $f; done\n"
        var files = [Self.main: PrepareTests.grub, "/etc/default/grub.d/50-x.cfg": "# nothing\n"]
        files[reader, default: ""] += line
        let rig = try SetupRig(files, programs: ["/usr/bin/grub-mkconfig"])
        #expect(try rig.setup().changes.map(\.path).contains(Self.own))
    }

    /// A menu like grub-mkconfig's: the kernel's entry, that for recovery, and another system's.
    static func menu(_ words: String) -> String {
        """
        ### BEGIN /etc/grub.d/10_linux ###
        menuentry 'Arch Linux' --class arch $menuentry_id_option 'gnulinux-simple-1' {
        \tlinux\t/boot/vmlinuz-linux root=UUID=1 rw \(words) quiet
        }
        submenu 'Advanced options' {
        \tmenuentry 'recovery' $menuentry_id_option 'gnulinux-6.1-recovery-1' {
        \t\tlinux\t/boot/vmlinuz-linux root=UUID=1 rw single
        \t}
        }
        ### END /etc/grub.d/10_linux ###
        ### BEGIN /etc/grub.d/30_os-prober ###
        menuentry 'Debian on /dev/sdb1' $menuentry_id_option 'osprober-gnulinux-2' {
        \tlinux\t/vmlinuz root=/dev/sdb1
        }
        ### END /etc/grub.d/30_os-prober ###

        """
    }

    @Test(arguments: ["/usr/bin/grub-mkconfig", "/usr/sbin/update-grub"])
    func theMenuIsReadBack(_ program: String) throws {
        let rig = try SetupRig([Self.main: PrepareTests.grub, Self.made: Self.menu("")], programs: [program])
        let words = Mutex("intel_iommu=on")
        let ran = Mutex(0)
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            ran.withLock { $0 += 1 }
            let menu = Array(Self.menu(words.withLock { $0 }).utf8)
            try Files.writeAtomically(menu, to: "\(root)\(Self.made)", mode: 0o640)
        }
        // As often as it is tried.
        for count in 1...2 {
            let error = failure { try host.apply(rig.setup()) }
            #expect(error?.code == .internal && error?.message.contains("lacks what was added") == true)
            #expect(error?.message.contains("Arch Linux") == true && error?.hint?.contains("iommu=pt") == true)
            #expect(try host.pending().count == 1 && ran.withLock { $0 } == count)
        }
        words.withLock { $0 = "intel_iommu=on iommu=pt" }
        try host.apply(rig.setup())
        #expect(try host.pending().isEmpty && ran.withLock { $0 } == 3)
    }

    /// Of another system somebody makes the menu later, there.
    @Test func theMenuOfAnotherSystem() throws {
        let rig = try SetupRig(
            [Self.main: PrepareTests.grub, Self.made: Self.menu("")], programs: ["/usr/sbin/update-grub"])
        let host = PreparedHost(root: rig.root, run: nil)
        try host.apply(rig.setup())
        #expect(try host.pending().isEmpty && rig.text(Self.main)?.contains("iommu=pt") == true)
    }

    /// The words are in the settings, by somebody who did not make the menu again.
    @Test func aMenuThatWasNotMadeAgain() throws {
        let set = "GRUB_CMDLINE_LINUX=\"intel_iommu=on iommu=pt\"\n"
        let rig = try SetupRig(
            [Self.main: set, Self.made: Self.menu("")], programs: ["/usr/sbin/update-grub"])
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            try Files.writeAtomically(Array(Self.menu("intel_iommu=on iommu=pt").utf8), to: "\(root)\(Self.made)")
        }
        let setup = try rig.setup()
        #expect(setup.commands == [["/usr/sbin/update-grub"]] && !setup.changes.contains { $0.path == Self.main })
        #expect(setup.notes.contains { $0.contains("GRUB's menu") })
        try host.apply(setup)
        #expect(try rig.setup().commands.isEmpty && rig.setup().notes.isEmpty)
    }

    /// Where GRUB has its menu, and what is read back is what the program wrote.
    @Test(arguments: [
        ("/usr/sbin/grub2-mkconfig", "/boot/grub2/grub.cfg", ""),
        ("/usr/sbin/grub2-mkconfig", "/boot/efi/EFI/fedora/grub.cfg", ""),
        ("/usr/sbin/update-grub", "/boot/grub2/grub.cfg", ""),
        ("/usr/sbin/update-grub", "/boot/grub2/grub.cfg", "exec grub2-mkconfig -o /boot/grub2/grub.cfg \"$@\"\n"),
        ("/usr/sbin/update-grub", "/boot/efi/EFI/x/grub.cfg", "grub-mkconfig --output=/boot/efi/EFI/x/grub.cfg\n"),
    ]) func whereTheMenuIs(_ program: String, _ made: String, _ script: String) throws {
        let rig = try SetupRig([Self.main: PrepareTests.grub, made: Self.menu("")], programs: [program])
        if !script.isEmpty { try rig.write(program, script) }
        try #require(Program.run("/usr/bin/chmod", ["755", "\(rig.root)\(program)"]).status == 0)
        let host = PreparedHost(root: rig.root) { _ in }
        let error = failure { try host.apply(rig.setup()) }
        #expect(error?.message.contains("\(rig.root)\(made), which") == true, "\(error?.message ?? "none")")
    }

    /// Red Hat's link tells which of two it boots by.
    @Test(arguments: ["../boot/efi/EFI/redhat/grub.cfg", "../boot/grub2/grub.cfg"])
    func aMenuOnTheEFIPartition(_ link: String) throws {
        let rig = try SetupRig(
            [Self.main: PrepareTests.grub, "/boot/grub2/grub.cfg": "", "/boot/efi/EFI/redhat/grub.cfg": ""],
            programs: ["/usr/sbin/grub2-mkconfig"])
        try #require(symlink(link, "\(rig.root)/etc/grub2-efi.cfg") == 0)
        #expect(try rig.setup().commands == [["/usr/sbin/grub2-mkconfig", "-o", String(link.dropFirst(2))]])
    }

    /// However the shell comes by the command line, it keeps what it has.
    @Test(arguments: [
        "GRUB_DEFAULT=0\r\nGRUB_CMDLINE_LINUX=\"root=x rd.luks.uuid=abc\"\r\n",
        "GRUB_TIMEOUT=5\r\nGRUB_CMDLINE_LINUX=\"root=x rd.luks.uuid=abc\"\n",
        "GRUB_TIMEOUT=5; GRUB_CMDLINE_LINUX=\"root=x rd.luks.uuid=abc\"\n",
        "[ -e /nonexistent ] || GRUB_CMDLINE_LINUX=\"root=x rd.luks.uuid=abc\"\n",
        "if true; then GRUB_CMDLINE_LINUX='root=x rd.luks.uuid=abc'; fi\n",
        ": ${GRUB_CMDLINE_LINUX:=root=x rd.luks.uuid=abc}\n",
        "readonly GRUB_X=1; export GRUB_Y=1 GRUB_CMDLINE_LINUX=\"root=x rd.luks.uuid=abc\"\n",
        "for word in root=x rd.luks.uuid=abc; do GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX $word\"; done\n",
    ]) func whatTheShellSetsStays(_ settings: String) throws {
        let rig = try SetupRig([Self.main: settings])
        let before = try rig.snapshot()
        let host = PreparedHost(root: rig.root) { _ in }
        try host.apply(rig.setup())
        let words = try Program.run(
            "/bin/sh", ["-c", ". '\(rig.root)\(Self.main)'; printf '%s\n' $GRUB_CMDLINE_LINUX"]
        ).output.split(whereSeparator: \.isWhitespace)
        #expect(Set(words).isSuperset(of: ["root=x", "rd.luks.uuid=abc", "intel_iommu=on", "iommu=pt"]), "\(words)")
        #expect(try rig.setup().changes.isEmpty)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }

    /// A word that undoes what is added, in a line that goes on in the next.
    @Test func whatUndoesItInSeveralLines() throws {
        let lines = "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet \\\n  intel_iommu=off\"\nGRUB_CMDLINE_LINUX=\"\"\n"
        let rig = try SetupRig(
            [Self.main: lines, "/etc/default/grub.d/50-x.cfg": ""], programs: [SetupRig.debianGRUB])
        #expect(failure { try rig.setup() }?.message.contains("in a way this program can't edit") == true)
        // A comment does not go on.
        try rig.write(Self.main, "# GRUB_CMDLINE_LINUX=\"\\\nGRUB_CMDLINE_LINUX=\"a\"\n")
        #expect(try rig.setup().changes.map(\.path).contains(Self.own))
        // It has no more to tell than that one word is wrong.
        let menu = Self.menu("intel_iommu=on iommu=pt intel_iommu=off")
        let other = try SetupRig([Self.main: PrepareTests.grub, Self.made: menu], programs: ["/usr/sbin/update-grub"])
        let error = failure { try PreparedHost(root: other.root) { _ in }.apply(other.setup()) }
        #expect(error?.message.contains("or has what undoes it") == true)
        #expect(error?.hint?.contains("take out what undoes it (intel_iommu=off") == true)
    }
}
