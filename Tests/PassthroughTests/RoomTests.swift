import FlotillaProtocol
import Glibc
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Passthrough

/// How many vGPUs a host has room for: what preflight, assessment and the making of them agree on.
@Suite struct RoomTests {
    private static func l40s(
        _ bus: String, functions: Int = 32, offering sizes: [Int] = [48, 24, 16, 12, 8, 6, 4, 3, 2, 1],
        _ change: (inout PciFunction) -> Void = { _ in }
    ) -> [PciFunction] {
        let gpu = "0000:\(bus):00.0"
        let types = sizes.map { size in
            VgpuType.with { ($0.id, $0.name, $0.available) = ("\(1100 + size)", "NVIDIA L40S-\(size)Q", 1) }
        }
        let virtual = (0..<functions).map { index in
            function(
                "0000:\(bus):\(padded(UInt32(index / 8 + 1), 2)).\(index % 8)", 0x10de, 0x26b9,
                group: Int32(100 + index)
            ) {
                ($0.physicalFunction, $0.vgpuPath, $0.vgpuTypes) = (gpu, "vendor-vfio", types)
            }
        }
        return [function(gpu, 0x10de, 0x26b9, group: 99) { change(&$0) }] + virtual
    }

    private static func host(_ functions: [PciFunction]) -> HostProfile {
        gpuHost { $0.pciFunctions = functions }
    }

    /// Which of these fit, in this order.
    private func fitting(_ wanted: [String], on host: HostProfile) -> [Bool] {
        let devices = wanted.enumerated().map { GpuMappingTests.vgpu("gpu\($0)", $1) }
        return matchDevices(devices, on: host).entries.map(\.findings.isEmpty)
    }

    @Test(arguments: [("48Q", 1), ("24Q", 2), ("12Q", 4), ("4Q", 12), ("1Q", 32), ("5Q", 0)])
    func theFrameBufferDecides(_ size: String, _ room: Int) {
        #expect(Self.host(Self.l40s("3b")).room(for: VgpuProfile("L40S-\(size)")) == UInt32(room))
    }

    /// One of 24 GB lives on it: the driver offers no other size.
    @Test func whatIsLeftBesideAVgpu() {
        var functions = Self.l40s("3b", offering: [24]) { $0.framebufferMib = 48 << 10 }
        (functions[1].hasVgpu_p, functions[1].vgpuProfiles, functions[1].vgpuTypes) = (true, ["NVIDIA L40S-24Q"], [])
        #expect(Self.host(functions).room(for: VgpuProfile("L40S-24Q")) == 1)
        #expect(Self.host(functions).room(for: VgpuProfile("L40S-12Q")) == 0)
        // Nobody says how much there is in all: one is certain.
        functions[0].framebufferMib = 0
        functions[1].vgpuProfiles = [""]
        #expect(Self.host(functions).room(for: VgpuProfile("L40S-24Q")) == 1)
        var mixed = Self.l40s("3b", offering: [24, 12, 8]) { ($0.framebufferMib, $0.mixedSizes) = (48 << 10, true) }
        (mixed[1].hasVgpu_p, mixed[1].vgpuProfiles, mixed[1].vgpuTypes) = (true, ["NVIDIA L40S-24Q"], [])
        #expect(Self.host(mixed).room(for: VgpuProfile("L40S-12Q")) == 2)
        #expect(fitting(["L40S-12Q", "L40S-8Q", "L40S-8Q"], on: Self.host(mixed)) == [true, true, false])
    }

    @Test func sizesThatDontMix() {
        let one = Self.host(Self.l40s("3b"))
        #expect(fitting(["L40S-24Q", "L40S-24Q", "L40S-24Q"], on: one) == [true, true, false])
        #expect(fitting(["L40S-24Q", "L40S-12Q"], on: one) == [true, false])
        let two = Self.host(Self.l40s("3b") + Self.l40s("5e"))
        #expect(fitting(["L40S-24Q", "L40S-12Q", "L40S-24Q", "L40S-8Q"], on: two) == [true, true, true, false])
        #expect(two.room(for: VgpuProfile("L40S-24Q")) == 4)
        // A GPU that goes to the VM as a whole holds none.
        #expect(two.room(for: VgpuProfile("L40S-24Q"), besides: ["0000:5e:00.0"]) == 2)
    }

    /// A physical function counts for itself, each type apart.
    @Test func mediatedDevices() {
        let types = [("4Q", 4), ("8Q", 2), ("16Q", 1), ("4C", 4)].map { size, count in
            VgpuType.with { ($0.id, $0.name, $0.available) = ("nvidia-\(size)", "GRID T4-\(size)", UInt32(count)) }
        }
        let host = Self.host([function("0000:af:00.0", 0x10de, 0x1eb8, group: 9) { $0.vgpuTypes = types }])
        #expect(host.room(for: VgpuProfile("T4-4Q")) == 4)
        #expect(fitting(["T4-8Q", "T4-8Q", "T4-8Q"], on: host) == [true, true, false])
        #expect(fitting(["T4-8Q", "T4-4Q"], on: host) == [true, false])
        #expect(fitting(["T4-4Q", "T4-4C", "T4-4Q", "T4-4C", "T4-4Q"], on: host) == [true, true, true, true, false])
        var mixed = host
        mixed.pciFunctions[0].mixedSizes = true
        #expect(fitting(["T4-8Q", "T4-4Q", "T4-4Q", "T4-4Q"], on: mixed) == [true, true, true, false])
    }

    @Test func instancesThatAreThereOrCouldBe() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        var host = try captured(machine, ["3b"])
        #expect(host.pciFunctions[0].mig.enabled && host.pciFunctions[0].mig.profiles.count == 7)
        for (profile, room) in [("1-5C", 7), ("2-10C", 3), ("3-20C", 2), ("4-20C", 1), ("7-40C", 1), ("1-5CME", 1)] {
            #expect(host.room(for: VgpuProfile("A100-\(profile)")) == UInt32(room), "\(profile)")
        }
        #expect(fitting(["A100-4-20C", "A100-3-20C", "A100-1-5C"], on: host) == [true, true, false])
        // Every function offers what one instance makes possible.
        try machine.partition("3b", "19:0,19:4")
        host = try captured(machine, ["3b"])
        #expect(host.pciFunctions.count { $0.vgpuTypes.contains { $0.name == "NVIDIA A100-1-5C" } } == 8)
        #expect(host.room(for: VgpuProfile("A100-1-5C")) == 7)
        // Only when those two are moved.
        #expect(host.room(for: VgpuProfile("A100-3-20C")) == 1 && host.room(for: VgpuProfile("A100-7-40C")) == 0)
        _ = try machine.host().create(
            VgpuProfile("A100-1-5C"), for: GPUOwner(domain: "a", migration: "m-1", fence: 1), device: "gpu0")
        host = try captured(machine, ["3b"])
        #expect(host.room(for: VgpuProfile("A100-3-20C")) == 0 && host.room(for: VgpuProfile("A100-1-5C")) == 6)
        // Nobody tells of instances: what is offered can be made once.
        host.pciFunctions[0].clearMig()
        #expect(host.room(for: VgpuProfile("A100-1-5C")) == 1)
    }

    /// Several may share an instance, of another size than theirs: where one is offered, one is certain.
    @Test func profilesThatShareAnInstance() {
        let gpu = function("0000:3b:00.0", 0x10de, 0x2bb5, group: 99) {
            $0.mig.enabled = true
            $0.mig.profiles = [.with { ($0.name, $0.id, $0.free, $0.total) = ("1g.24gb+gfx", "47", 3, 4) }]
            $0.mig.instances = [.with { ($0.name, $0.id) = ("1g.24gb+gfx", "3") }]
        }
        let parts = (1...4).map { index in
            function("0000:3b:00.\(index)", 0x10de, 0x2bb5, group: Int32(100 + index)) {
                ($0.physicalFunction, $0.vgpuPath) = (gpu.address, "vendor-vfio")
                $0.vgpuTypes = [.with { ($0.id, $0.name, $0.available) = ("1", "NVIDIA RTX PRO 6000 DC-1-12Q", 1) }]
            }
        }
        let (profile, other) = ("RTX PRO 6000 DC-1-12Q", "RTX PRO 6000 DC-2-24Q")
        #expect(Self.host([gpu] + parts).room(for: VgpuProfile(profile)) == 1)
        #expect(fitting([profile, profile, other], on: Self.host([gpu] + parts)) == [true, false, false])
    }

    /// What is said to fit is made, and what is not is refused, one after the other on two cards.
    @Test(arguments: [
        ["A100-3-20C", "A100-1-5C", "A100-2-10C", "A100-4-20C", "A100-3-20C", "A100-1-10C", "A100-1-5C", "A100-2-10C"],
        ["A100-1-5C", "A100-7-40C", "A100-4-20C", "A100-2-10C", "A100-3-20C", "A100-1-5CME", "A100-1-5CME"],
        ["A100-2-10C", "A100-2-10C", "A100-3-20C", "A100-3-20C", "A100-3-20C", "A100-4-20C"],
    ])
    func whatFitsIsMade(_ wanted: [String]) throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        try machine.migGPU("5e")
        // Somebody else's, unused: one of them would have to be moved for what begins at 0.
        try machine.partition("5e", "14:0")
        let said = try fitting(wanted, on: captured(machine, ["3b", "5e"]))
        let made = try wanted.enumerated().map { index, profile in
            let owner = GPUOwner(domain: "d\(index)", migration: "m-\(index)", fence: 1)
            let alone = try captured(machine, ["3b", "5e"]).room(for: VgpuProfile(profile)) > 0
            let error = failure { try machine.host().create(VgpuProfile(profile), for: owner, device: "gpu0") }
            #expect(alone == (error == nil), "\(index) \(profile): \(error?.message ?? "was made")")
            return error == nil
        }
        #expect(said == made && made.contains(true))
    }

    /// The same where the frame buffer decides, on both forms of the list.
    @Test(arguments: [["NVIDIA L40S-48Q 1", "NVIDIA L40S-24Q 2"], ["1 : NVIDIA L40S-48Q", "2 : NVIDIA L40S-24Q"]])
    func theListsOfTheVendorsPath(_ types: [String]) throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: types, virtualFunctions: 6)
        try machine.program(
            "nvidia-smi",
            """
            [ "$1 $2 $3" = "vgpu -s -v" ] || exit 1
            echo 'GPU 00000000:3B:00.0'
            for t in '0x1 48' '0x2 24'; do set -- $t
              echo "    vGPU Type ID                          : $1"
              echo "        Name                              : NVIDIA L40S-$2Q"
              echo "        GPU Instance Profile ID           : N/A"
              echo "        FB Memory                         : $(($2 * 1024)) MiB"
            done
            """)
        let host = machine.host()
        try host.enableVirtualFunctions(of: pci("0000:3b:00.0"))
        let profile = VgpuProfile("L40S-24Q")
        for left in [2, 1, 0] {
            #expect(try captured(machine, ["3b"]).room(for: profile) == UInt32(left))
            let owner = GPUOwner(domain: "d\(left)", migration: "m-\(left)", fence: 1)
            let error = failure { try host.create(profile, for: owner, device: "gpu0") }
            #expect((error == nil) == (left > 0), "\(error?.message ?? "made")")
        }
        // Somebody else made the first: the program knows its type by number.
        try Files.remove("\(machine.folder.path)/state/vgpus.json")
        #expect(try captured(machine, ["3b"]).pciFunctions[1].vgpuProfiles == ["NVIDIA L40S-24Q"])
    }

    @Test func checkAgrees() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        try machine.put("bus/pci/devices/0000:3b:00.0/class", "0x030200\n")
        _ = try captured(machine, ["3b"])
        let gpu = try pci("0000:3b:00.0")
        func check(_ profile: String) throws -> Requirement? {
            checkDevices(
                [gpu], vgpu: profile, in: try DeviceTree(machine.sysfs), migs: machine.host().migs(of: [gpu])
            ).first { ["profile", "MIG mode"].contains($0.requirement) }
        }
        #expect(try check("A100-3-20C")?.verdict == .pass)
        #expect(try check("A100-3-20C")?.found.contains("GPU instance 3g.20gb, which is made") == true)
        try machine.partition("3b", "9:0,9:4")
        #expect(try check("A100-3-20C")?.found.contains("can be made on 0000:3b:00.1") == true)
        #expect(try check("A100-1-5C")?.verdict == .fail)
        try machine.write("Disabled", to: "mig/0000:3b:00.0/mode")
        let off = try #require(try check("A100-1-5C"))
        #expect(off.requirement == "MIG mode" && off.remedy?.contains("--enable-mig 0000:3b:00.0") == true)
    }

    @Test func noRoomSaysWhy() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b", isOn: false)
        func finding() throws -> Finding? {
            try matchDevices([GpuMappingTests.vgpu("gpu0", "A100-7-40C")], on: captured(machine, ["3b"])).findings.first
        }
        #expect(try finding()?.remedy.contains("flotilla gpu profiles --enable-mig 0000:3b:00.0") == true)
        try machine.write("Enabled", to: "mig/0000:3b:00.0/mode")
        #expect(try finding() == nil)
        try machine.partition("3b", "9:4")
        _ = try machine.host().create(
            VgpuProfile("A100-3-20C"), for: GPUOwner(domain: "a", migration: "m-1", fence: 1), device: "gpu0")
        #expect(try finding()?.message.contains("0000:3b:00.0 is cut into 3g.20gb") == true)
    }
}
