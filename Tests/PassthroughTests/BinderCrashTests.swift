import Glibc
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// Dies by SIGKILL at every failpoint; the next process puts things right.
@Suite(.serialized) struct BinderCrashTests {
    /// Journal written; before each of six writes and after the last; done.
    static let points = ["gpu.journaled"] + (1...7).map { "gpu.step:\($0)" } + ["gpu.done"]

    @Test(arguments: points) func killedWhileBinding(_ point: String) async throws {
        let rig = try BindRig()
        let before = drivers(rig.sysfs)
        let root = rig.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) { [root = root as String, point = point as String] in
            setenv(Failpoint.environmentKey, point, 1)
            let sysfs = Sysfs(root: "\(root)/sys")
            let binder = Binder(
                sysfs: sysfs, kernel: FixtureKernel(sysfs), folder: "\(root)/state", boot: "boot-1", loadDriver: {})
            _ = try binder.bind([pci("0000:01:00.0")]) { try DeviceTree(sysfs) }
        }
        try expectRecovery(rig, before, bound: point == "gpu.done")
    }

    @Test(arguments: points) func killedWhileReleasing(_ point: String) async throws {
        let rig = try BindRig()
        let before = drivers(rig.sysfs)
        _ = try rig.binder(FixtureKernel(rig.sysfs)).bind([pci("0000:01:00.0")], observe: rig.observe())
        let root = rig.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [root = root as String, point = point as String, before = before as [String]] in
            setenv(Failpoint.environmentKey, point, 1)
            let sysfs = Sysfs(root: "\(root)/sys")
            let binder = Binder(
                sysfs: sysfs, kernel: FixtureKernel(sysfs, knowing: before), folder: "\(root)/state",
                boot: "boot-1", loadDriver: {})
            _ = try binder.release([pci("0000:01:00.0")]) { try DeviceTree(sysfs) }
        }
        try rig.binder(FixtureKernel(rig.sysfs, knowing: before)).recover()
        #expect(drivers(rig.sysfs) == before)
    }

    /// The process that recovers dies too, at each of its own writes.
    @Test(arguments: 1...6) func killedWhileRecovering(_ step: Int) async throws {
        let rig = try BindRig()
        let before = drivers(rig.sysfs)
        let root = rig.folder.path
        await #expect(processExitsWith: .signal(SIGKILL)) { [root = root as String] in
            setenv(Failpoint.environmentKey, "gpu.step:7", 1)
            let sysfs = Sysfs(root: "\(root)/sys")
            let binder = Binder(
                sysfs: sysfs, kernel: FixtureKernel(sysfs), folder: "\(root)/state", boot: "boot-1", loadDriver: {})
            _ = try binder.bind([pci("0000:01:00.0")]) { try DeviceTree(sysfs) }
        }
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [root = root as String, step = step as Int, before = before as [String]] in
            setenv(Failpoint.environmentKey, "gpu.step:\(step)", 1)
            let sysfs = Sysfs(root: "\(root)/sys")
            try Binder(
                sysfs: sysfs, kernel: FixtureKernel(sysfs, knowing: before), folder: "\(root)/state",
                boot: "boot-1", loadDriver: {}
            ).recover()
        }
        try rig.binder(FixtureKernel(rig.sysfs, knowing: before)).recover()
        #expect(drivers(rig.sysfs) == before)
    }

    private func expectRecovery(_ rig: BindRig, _ before: [String], bound: Bool) throws {
        let binder = rig.binder(FixtureKernel(rig.sysfs, knowing: before))
        try binder.recover()
        if bound {
            #expect(rig.driver("0000:01:00.0") == "vfio-pci" && rig.driver("0000:01:00.1") == "vfio-pci")
            _ = try binder.release([pci("0000:01:00.0")], observe: rig.observe())
        }
        #expect(drivers(rig.sysfs) == before && !rig.journal.contains("0000:01"))
    }
}
