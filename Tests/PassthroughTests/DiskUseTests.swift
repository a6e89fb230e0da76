import Foundation
import Glibc
import HostKit
import MigrationModel
import Passthrough
import TestKit
import Testing

/// Disks that the kernel's lists of mounts don't name by their number.
@Suite struct DiskUseTests {
    static let nvme = "0000:09:00.0"

    private func uses(_ rig: BindRig, _ around: Surroundings) throws -> [String] {
        try #require(DeviceTree(rig.sysfs, around: around)[pci(Self.nvme)]).uses.map(\.by)
    }

    private func link(_ rig: BindRig, _ path: String, _ target: String) throws {
        try Files.createDirectories(Files.parent(of: path))
        try FileManager.default.createSymbolicLink(atPath: path, withDestinationPath: target)
    }

    @Test(arguments: [
        ("36 35 0:40 /@ / rw,relatime shared:1 - btrfs /dev/nvme1n1 rw,subvol=/@", true),
        ("36 35 0:41 / / rw master:1 - zfs rpool/ROOT/debian rw", false),
        ("36 35 0:42 / / rw - overlay nvme1n1 rw", false), ("", false), ("36 35", false), ("36 35 0:40 - ", false),
    ]) func theSourceOfAMount(_ mount: String, _ isUsed: Bool) throws {
        let rig = try BindRig()
        var around = Surroundings()
        try rig.disk(mounts: mount, &around)
        #expect(try uses(rig, around) == (isUsed ? ["a mounted file system on nvme1n1"] : []))
    }

    /// The mount names one of its devices.
    @Test func theOtherDevicesOfABtrfs() throws {
        let rig = try BindRig()
        var around = Surroundings()
        try rig.disk(mounts: "36 35 0:40 / / rw - btrfs /dev/sda rw", &around)
        #expect(try uses(rig, around).isEmpty)
        try link(rig, rig.sysfs.path("fs/btrfs/2c9e/devices/nvme1n1"), "../../../../class/block/nvme1n1")
        #expect(try uses(rig, around) == ["a mounted file system on nvme1n1"])
    }

    /// A disk with two controllers lies below their subsystem, on neither's path.
    @Test func nativeMultipath() throws {
        let rig = try BindRig()
        var around = Surroundings()
        let subsystem = "devices/virtual/nvme-subsystem/nvme-subsys1"
        try Files.createDirectories(rig.sysfs.path("devices/0000:09:00.0/nvme/nvme1"))
        try link(rig, rig.sysfs.path("\(subsystem)/nvme1"), "../../../0000:09:00.0/nvme/nvme1")
        try rig.disk(at: subsystem, &around)
        try rig.disk(
            named: "nvme1n1p2", at: "\(subsystem)/nvme1n1", number: "259:9",
            mounts: "36 35 259:9 / / rw - ext4 /dev/mapper/root rw", &around)
        #expect(try uses(rig, around) == ["a mounted file system on nvme1n1p2"])
    }

    /// A disk over Fibre Channel knows its adapter by the name of a port alone.
    @Test(arguments: ["0x100000109b000001", "0x100000109b000002"]) func fibreChannel(_ port: String) throws {
        let rig = try BindRig()
        var around = Surroundings()
        let subsystem = "devices/virtual/nvme-subsystem/nvme-subsys1"
        let host = "devices/0000:09:00.0/host1/fc_host/host1"
        let controller = "devices/virtual/nvme-fabrics/ctl/nvme1"
        let address =
            "traddr=nn-0x200900a098d00001:pn-0x201000a098d00001,host_traddr=nn-0x200000109b000001:pn-0x100000109b000001\n"
        for (path, text) in [("\(controller)/address", address), ("\(host)/port_name", "\(port)\n")] {
            try Files.createDirectories(Files.parent(of: rig.sysfs.path(path)))
            try Files.writeAtomically(Array(text.utf8), to: rig.sysfs.path(path))
        }
        try link(rig, rig.sysfs.path("class/fc_host/host1"), "../../\(host)")
        try link(rig, rig.sysfs.path("\(subsystem)/nvme1"), "../../nvme-fabrics/ctl/nvme1")
        try rig.disk(at: subsystem, mounts: "36 35 259:7 / / rw - ext4 /dev/nvme1n1 rw", &around)
        let expected = port.hasSuffix("1") ? ["a mounted file system on nvme1n1"] : []
        #expect(try uses(rig, around) == expected)
    }

    @Test(arguments: [
        ("infiniband_verbs", "infiniband/uverbs0"), ("infiniband_mad", "infiniband/umad0"), ("uio", "uio0"),
        ("nvme", "nvme1"), ("nvme-generic", "ng1n1"),
    ])
    func devicesOfAClass(_ name: String, _ file: String) throws {
        let rig = try BindRig()
        var around = Surroundings()
        let device = Files.name(of: file)
        try link(rig, rig.sysfs.path("class/\(name)/\(device)"), "../../devices/\(Self.nvme)/\(name)/\(device)")
        let proc = try rig.folder.sub("proc")
        try link(rig, "\(proc)/42/fd/7", "/dev/\(file)")
        try link(rig, "\(proc)/42/fd/8", "/dev/\(file)")
        try Files.writeAtomically(Array("dpdk\n".utf8), to: "\(proc)/42/comm")
        around.holders = DeviceHolders(proc: proc)
        #expect(try uses(rig, around) == ["process 42 (dpdk), which has \(device)"])
    }

    /// What is made of a disk without claiming it: a loop device, an export over a network.
    @Test(arguments: [
        ("class/block/loop3/loop/backing_file", "loop device loop3"),
        ("kernel/config/nvmet/subsystems/nqn.x/namespaces/1/device_path", "a namespace of the NVMe target nqn.x"),
    ]) func whatIsMadeOfADisk(_ attribute: String, _ use: String) throws {
        let rig = try BindRig()
        var around = Surroundings()
        try rig.disk(&around)
        #expect(try uses(rig, around).isEmpty)
        try Files.createDirectories(Files.parent(of: rig.sysfs.path(attribute)))
        try Files.writeAtomically(Array("/dev/nvme1n1\n".utf8), to: rig.sysfs.path(attribute))
        #expect(try uses(rig, around) == ["\(use) on nvme1n1"])
    }

    /// Found by its number: sysfs leads from it to the device.
    @Test func anyCharacterDevice() throws {
        let rig = try BindRig()
        var around = Surroundings()
        try link(rig, rig.sysfs.path("dev/char/245:0"), "../../devices/\(Self.nvme)/tenstorrent/tenstorrent!0")
        around.holders.byNumber = ["245:0": "process 42 (python3), which has tenstorrent/0", "1:3": "process 1 (init)"]
        #expect(try uses(rig, around) == ["process 42 (python3), which has tenstorrent/0"])
        let proc = try rig.folder.sub("proc")
        try link(rig, "\(proc)/42/fd/0", "/dev/null")
        #expect(DeviceHolders(proc: proc).byNumber == ["1:3": "process 42 (), which has null"])
    }

    @Test func aSerialConsole() throws {
        let rig = try BindRig()
        try link(rig, rig.sysfs.path("class/tty/ttyS4"), "../../devices/\(Self.nvme)/tty/ttyS4")
        try Files.createDirectories(rig.sysfs.path("class/tty/console"))
        try Files.writeAtomically(Array("tty0 ttyS4\n".utf8), to: rig.sysfs.path("class/tty/console/active"))
        #expect(try uses(rig, Surroundings()) == ["the kernel's console on ttyS4"])
    }

    /// Without a word of its link, with one that 802.1X holds up, and in a namespace where it doesn't show.
    @Test(arguments: ["unknown", "dormant", "down", "up"]) func networkInterfaces(_ state: String) throws {
        let rig = try BindRig()
        let device = "devices/\(Self.nvme)/virtio2/net"
        try Files.createDirectories(rig.sysfs.path("bus/pci/devices/\(Self.nvme)/virtio2/net"))
        let elsewhere = "a network interface in another network namespace"
        #expect(try uses(rig, Surroundings()) == [elsewhere])
        try Files.createDirectories(rig.sysfs.path("bus/pci/devices/\(Self.nvme)/virtio2/net/eth7"))
        try Files.createDirectories(rig.sysfs.path("\(device)/eth7"))
        try Files.writeAtomically(Array("\(state)\n".utf8), to: rig.sysfs.path("\(device)/eth7/operstate"))
        if state != "down" {
            try Files.writeAtomically(Array("1\n".utf8), to: rig.sysfs.path("\(device)/eth7/carrier"))
        }
        try link(rig, rig.sysfs.path("class/net/eth7"), "../../\(device)/eth7")
        #expect(try uses(rig, Surroundings()) == (state == "down" ? [] : ["network interface eth7, which is up"]))
    }

    @Test func domainsAndProcesses() throws {
        let rig = try BindRig()
        var around = Surroundings()
        try rig.disk(&around)
        let proc = try rig.folder.sub("proc")
        try link(rig, "\(proc)/42/fd/7", "/dev/nvme1n1")
        try Files.createDirectories("\(proc)/42/fdinfo")
        try Files.writeAtomically(Array("qemu\n".utf8), to: "\(proc)/42/comm")
        for (flags, found) in [("0100000", []), ("02100002", ["process 42 (qemu), which writes to nvme1n1"])] {
            try Files.writeAtomically(Array("pos:\t0\nflags:\t\(flags)\n".utf8), to: "\(proc)/42/fdinfo/7")
            around.holders = DeviceHolders(proc: proc)
            #expect(try uses(rig, around) == found)
        }
        around.domains = [GPULedger.Domain(name: "web", migration: "", resources: [], disks: ["/dev/nvme1n1"])]
        #expect(try uses(rig, around) == ["domain web's disk on nvme1n1"])
    }

    /// Somebody of whom no list says anything, as ZFS: the kernel knows.
    @Test(.enabled(if: geteuid() == 0)) func claimedWithinTheKernel() throws {
        let rig = try BindRig()
        let file = "\(rig.folder.path)/image"
        try File(file, O_RDWR | O_CREAT).truncate(to: 1 << 20)
        let made = try Program.run("/usr/sbin/losetup", ["--find", "--show", file])
        let path = made.output.filter { !$0.isNewline }
        try #require(made.status == 0 && path.hasPrefix("/dev/loop"), "\(made.output)")
        defer { _ = try? Program.run("/usr/sbin/losetup", ["--detach", path]) }
        let name = Files.name(of: path)
        let number = try #require(Sysfs().text("class/block/\(name)/dev"))

        var around = Surroundings()
        try rig.disk(named: name, number: number, &around)
        around.devices = "/dev"
        #expect(try uses(rig, around).isEmpty)
        let holder = try File(path, O_RDONLY | O_EXCL)
        let said = try uses(rig, around)
        #expect(said.count == 1 && said.first?.hasPrefix("whoever claimed \(name) in the kernel") == true, "\(said)")
        let refused = failure {
            try rig.binder(FixtureKernel(rig.sysfs)).bind(
                [pci(Self.nvme)], consent: [.group, .use], observe: rig.observe(around))
        }
        #expect(refused?.code == .failedPrecondition && refused?.hint?.contains("unmount") == true)
        // Of a recorded tree nobody on this machine is asked.
        around.devices = nil
        #expect(try uses(rig, around).isEmpty)
        withExtendedLifetime(holder) {}
    }

    /// Whoever sends commands past the disks, to read as well.
    @Test(arguments: [("scsi_generic", "sg4", "sg4"), ("bsg", "4:0:0:0", "bsg/4:0:0:0")])
    func genericDevices(_ kind: String, _ name: String, _ file: String) throws {
        let rig = try BindRig()
        let folder = "devices/0000:09:00.0/host4/target4:0:0/4:0:0:0/\(kind)/\(name)"
        try Files.createDirectories(rig.sysfs.path(folder))
        try Files.createDirectories(rig.sysfs.path("class/\(kind)"))
        #expect(symlink("../../\(folder)", rig.sysfs.path("class/\(kind)/\(name)")) == 0)
        let proc = "\(rig.folder.path)/proc"
        let open = try rig.folder.sub("proc/42/fd")
        try Files.writeAtomically(Array("smartd\n".utf8), to: "\(proc)/42/comm")
        var around = Surroundings()
        #expect(try uses(rig, around).isEmpty)
        #expect(symlink("/dev/\(file)", "\(open)/3") == 0)
        around.holders = DeviceHolders(proc: proc)
        #expect(try uses(rig, around) == ["process 42 (smartd), which has \(name)"])
        let refused = failure {
            try rig.binder(FixtureKernel(rig.sysfs)).bind(
                [pci(Self.nvme)], consent: .group, observe: rig.observe(around))
        }
        #expect(refused?.code == .failedPrecondition && refused?.hint?.contains("--force-in-use") == true)
    }

    /// A file of that name that is not that disk says nothing of it.
    @Test(.enabled(if: geteuid() == 0), arguments: ["1:3", ""]) func aDiskThatCanNotBeAsked(_ number: String) throws {
        let rig = try BindRig()
        var around = Surroundings()
        let name = number.isEmpty ? "nvme99n99" : "null"
        try rig.disk(named: name, number: number, &around)
        around.devices = "/dev"
        let why = number.isEmpty ? "No such file or directory" : "it is another device"
        #expect(try uses(rig, around) == ["whoever has \(name): /dev/\(name) can't be asked (\(why))"])
        // One path of a disk with several.
        try Files.writeAtomically(Array("1\n".utf8), to: rig.sysfs.path("class/block/\(name)/hidden"))
        #expect(try uses(rig, around).isEmpty)
    }
}
