import HostKit
import MigrationModel
import Passthrough
import Synchronization
import TestKit
import Testing

/// Runs that end before they are done: what the next one makes of them.
@Suite struct PrepareUnfinishedTests {
    static let modprobe = "/etc/modprobe.d/flotilla-vfio.conf"
    static let rules = "/etc/udev/rules.d/10-flotilla-vfio.rules"
    static let programs = [SetupRig.debianGRUB, "/usr/sbin/update-grub", "/usr/sbin/update-initramfs"]
    static let all = ["update-grub", "update-initramfs"]

    static func debian() throws -> SetupRig {
        try SetupRig(
            ["/etc/default/grub": PrepareTests.grub, "/etc/default/grub.d/init.cfg": "# nothing\n"], programs: programs)
    }

    /// Notes which programs ran, and fails as often as it is told.
    final class Runner: Sendable {
        let ran = Mutex<[String]>([])
        let failing = Mutex<String?>(nil)

        func run(_ command: [String]) throws {
            let name = Files.name(of: command[0])
            if failing.withLock({ $0 }) == name { throw MigrationError(.internal, "killed") }
            ran.withLock { $0.append(name) }
        }

        func take() -> [String] {
            ran.withLock { names in
                defer { names = [] }
                return names
            }
        }
    }

    static func revert(_ host: PreparedHost, _ rig: SetupRig) throws {
        try host.revert(commands: HostSetup.commands(root: rig.root, for: host.reverting().map(\.path)))
    }

    /// Died at this file, with those before it written.
    @Test(arguments: [
        PrepareGRUBTests.own, "/etc/modules-load.d/flotilla-vfio.conf", rules, modprobe,
        "/etc/initramfs-tools/hooks/flotilla-vfio",
    ]) func betweenTheFiles(_ path: String) throws {
        let rig = try Self.debian()
        let runner = Runner()
        let host = PreparedHost(root: rig.root, run: runner.run)
        try Files.createDirectories(Files.parent(of: "\(rig.root)\(path)"))
        let before = try rig.snapshot()
        let setup = try rig.setup(["0000:01:00.0"])
        // What is no file can't be replaced by one.
        try rig.write("\(path)/x", "")
        #expect(failure { try host.apply(setup) } != nil && runner.take().isEmpty)
        #expect(try host.pending().map { Files.name(of: $0[0]) } == Self.all)
        try Files.remove("\(rig.root)\(path)/x")
        try Files.removeDirectoryIfEmpty("\(rig.root)\(path)")
        try host.apply(rig.setup(["0000:01:00.0"]))
        #expect(try runner.take() == Self.all && host.pending().isEmpty)
        try Self.revert(host, rig)
        #expect(try runner.take() == Self.all && rig.snapshot() == before)
    }

    /// Died at a program, on the way there or back: no file is left to change then.
    @Test(arguments: all, [true, false]) func atAProgram(_ name: String, _ back: Bool) throws {
        let rig = try Self.debian()
        let runner = Runner()
        let host = PreparedHost(root: rig.root, run: runner.run)
        let before = try rig.snapshot()
        if back { try host.apply(rig.setup(["0000:01:00.0"])) }
        _ = runner.take()
        func step() throws {
            if back { try Self.revert(host, rig) } else { try host.apply(rig.setup(["0000:01:00.0"])) }
        }
        runner.failing.withLock { $0 = name }
        for _ in 1...2 {
            #expect(failure { try step() }?.message == "killed")
            let left = try host.pending().map { Files.name(of: $0[0]) }
            #expect(left == Array(Self.all.drop { $0 != name }))
        }
        _ = runner.take()
        runner.failing.withLock { $0 = nil }
        #expect(try back ? host.reverting().isEmpty : rig.setup(["0000:01:00.0"]).changes.isEmpty)
        try step()
        #expect(runner.take() == Array(Self.all.drop { $0 != name }))
        if !back { try Self.revert(host, rig) }
        #expect(try rig.snapshot() == before)
    }

    /// Of the files some are back already: the programs of those too have still to run.
    @Test func betweenTheFilesOnTheWayBack() throws {
        let rig = try Self.debian()
        let runner = Runner()
        let host = PreparedHost(root: rig.root, run: runner.run)
        let before = try rig.snapshot()
        runner.failing.withLock { $0 = "update-grub" }
        #expect(failure { try host.apply(rig.setup(["0000:01:00.0"])) } != nil)
        try Files.remove("\(rig.root)\(PrepareGRUBTests.own)")
        runner.failing.withLock { $0 = nil }
        try Self.revert(host, rig)
        #expect(try runner.take() == Self.all && rig.snapshot() == before)
    }

    /// A menu without the words is seen before the next program can fail, and made again by the next run.
    @Test func theMenuIsNotForgotten() throws {
        let rig = try Self.debian()
        try rig.write(PrepareGRUBTests.made, PrepareGRUBTests.menu(""))
        let words = Mutex("")
        let runner = Runner()
        runner.failing.withLock { $0 = "update-initramfs" }
        let host = PreparedHost(root: rig.root) { [root = rig.root] command in
            try runner.run(command)
            let menu = Array(PrepareGRUBTests.menu(words.withLock { $0 }).utf8)
            try Files.writeAtomically(menu, to: "\(root)\(PrepareGRUBTests.made)", mode: 0o640)
        }
        for _ in 1...2 {
            let error = failure { try host.apply(rig.setup(["0000:01:00.0"])) }
            #expect(error?.message.contains("lacks what was added") == true)
            #expect(try runner.take() == ["update-grub"] && host.pending().count == 2)
        }
        words.withLock { $0 = "intel_iommu=on iommu=pt" }
        #expect(failure { try host.apply(rig.setup(["0000:01:00.0"])) }?.message == "killed")
        runner.failing.withLock { $0 = nil }
        try host.apply(rig.setup(["0000:01:00.0"]))
        #expect(try runner.take() == Self.all && host.pending().isEmpty)
    }

    /// A start before what was written says nothing; one after it does.
    @Test func startedSince() throws {
        let rig = try Self.debian()
        let host = PreparedHost(root: rig.root) { _ in }
        #expect(!host.isStartedSince("cpu 1 2\nbtime 9999999999\n"))
        try host.apply(rig.setup())
        #expect(host.isStartedSince("cpu 1 2\nbtime 9999999999\n") && !host.isStartedSince("btime 1000\nx 1\n"))
        #expect(!host.isStartedSince(""))
    }

    static let boot = "/boot/efi/loader/entries/6.1.conf"

    /// kernel-install of a Debian with systemd-boot writes an entry anew, and then a program fails or all is killed.
    @Test func anEntryWrittenAnewByAProgramThatFailed() throws {
        let programs = ["/etc/initramfs/post-update.d/systemd-boot", "/usr/sbin/update-initramfs"]
        let rig = try SetupRig([Self.boot: "linux /a\noptions root=x ro\n"], programs: programs)
        let isFailing = Mutex(true)
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            // Where there is no file it takes the running kernel's, which has the words after a reboot.
            let line = (try? Files.read("\(root)/etc/kernel/cmdline")).map { String(decoding: $0, as: UTF8.self) }
            let options = line ?? "root=x ro intel_iommu=on iommu=pt\n"
            let entry = Array("linux /b\noptions    \(options)".utf8)
            try Files.writeAtomically(entry, to: "\(root)\(Self.boot)", mode: 0o640)
            if isFailing.withLock({ $0 }) { throw MigrationError(.internal, "disk full") }
        }
        let before = try rig.snapshot()
        // At once back.
        #expect(failure { try host.apply(rig.setup(["0000:01:00.0"])) }?.message == "disk full")
        #expect(failure { try Self.revert(host, rig) }?.message == "disk full")
        isFailing.withLock { $0 = false }
        try Self.revert(host, rig)
        #expect(try rig.snapshot() == before)
        // To the end, and back.
        isFailing.withLock { $0 = true }
        #expect(failure { try host.apply(rig.setup(["0000:01:00.0"])) }?.message == "disk full")
        isFailing.withLock { $0 = false }
        try host.apply(rig.setup(["0000:01:00.0"]))
        #expect(try host.pending().isEmpty && rig.setup(["0000:01:00.0"]).changes.isEmpty)
        // What a person writes there later is still somebody else's.
        let written = try #require(rig.text(Self.boot))
        try rig.write(Self.boot, written + "# mine\n")
        #expect(failure { try Self.revert(host, rig) }?.message.contains("changed by somebody else") == true)
        try rig.write(Self.boot, written)
        try Self.revert(host, rig)
        #expect(try rig.snapshot() == before)
    }

    /// A program that loses the words of an entry runs again, until it keeps them; and back is to what was there first.
    @Test func wordsThatWereLost() throws {
        let path = PrepareWordsTests.entry
        let rig = try SetupRig([path: "linux /a\noptions root=x\n"], programs: ["/usr/sbin/update-initramfs"])
        let words = Mutex("")
        let count = Mutex(0)
        let host = PreparedHost(root: rig.root) { [root = rig.root] _ in
            count.withLock { $0 += 1 }
            let text = "linux /b\noptions root=x\(words.withLock { $0 })\n"
            try Files.writeAtomically(Array(text.utf8), to: "\(root)\(path)", mode: 0o640)
        }
        let before = try rig.snapshot()
        for tries in 1...2 {
            let error = failure { try host.apply(rig.setup(["0000:01:00.0"])) }
            #expect(error?.message.contains("without what was added") == true)
            #expect(try host.pending().count == 1 && count.withLock { $0 } == tries)
        }
        words.withLock { $0 = " intel_iommu=on iommu=pt" }
        try host.apply(rig.setup(["0000:01:00.0"]))
        #expect(try host.pending().isEmpty && count.withLock { $0 } == 3)
        try host.revert(commands: [])
        #expect(try rig.snapshot() == before)
    }
}
