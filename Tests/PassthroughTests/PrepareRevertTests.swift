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
}
