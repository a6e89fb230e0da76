import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Passthrough

/// What a person asks for by hand, and what is left when that did not come to its end.
@Suite struct VgpuHandTests {
    private let web = GPUOwner(domain: "web", migration: "", fence: 0)
    private let small = VgpuProfile("A40-2Q")

    private func vendor() throws -> VgpuMachine {
        let machine = try VgpuMachine()
        for bus in ["3b", "5e"] {
            try machine.vendorGPU(bus, types: ["NVIDIA A40-2Q 558", "NVIDIA A40-4Q 559"])
            try machine.host().enableVirtualFunctions(of: pci("0000:\(bus):00.0"))
        }
        return machine
    }

    /// A slip of the finger costs no vGPU.
    @Test(arguments: ["A40-4Q", "A40-9Q", "A40-2Q"]) func noneIsReplaced(_ wanted: String) throws {
        let machine = try vendor()
        let made = try machine.host().create(small, for: web, device: "gpu0")
        let other = try pci(made.physical == "0000:3b:00.0" ? "0000:5e:00.0" : "0000:3b:00.0")
        // The same profile on another GPU is another one.
        let gpu = wanted == "A40-2Q" ? other : nil
        let (profile, host) = (VgpuProfile(wanted), machine.host())
        for refused in [
            failure { _ = try host.create(profile, for: web, device: "gpu0", on: gpu) },
            failure { _ = try host.plan(create: profile, for: web, device: "gpu0", on: gpu) },
        ] {
            #expect(
                refused?.code == .failedPrecondition && refused?.message.contains("is a NVIDIA A40-2Q already") == true)
            #expect(refused?.hint?.contains("gpu destroy --domain web --device gpu0") == true)
        }
        #expect(try host.records() == [made])
        #expect(machine.sysfs.text("bus/pci/devices/\(made.function)/nvidia/current_vgpu_type") == "558")
        #expect(try host.create(small, for: web, device: "gpu0", on: pci(made.physical)) == made)
    }

    /// Killed between the reservation and the record, or with an instance cut: one command gives all back.
    @Test func whatAKilledCommandLeft() throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        let (host, gpu) = (machine.host(), try pci("0000:3b:00.0"))
        let part = GPUResource(function: try pci("0000:3b:00.1"), partOf: gpu)
        try machine.ledger.reserve([part], for: web)
        try host.addInstance(for: VgpuProfile("A100-1-5C"), on: gpu, for: web, device: "gpu0")
        // A vGPU that is there is none of that.
        let kept = GPUOwner(domain: "kept", migration: "", fence: 0)
        let made = try host.create(VgpuProfile("A100-2-10C"), for: kept, device: "gpu0")
        #expect(try host.unfinished(ofDomain: "kept").isEmpty && host.takeBackUnfinished(ofDomain: "kept").isEmpty)
        let other = failure { try machine.ledger.reserve([part], for: kept) }
        #expect(other?.hint?.contains("gpu destroy --domain web") == true)

        let left = try host.unfinished(ofDomain: "web")
        #expect(left.count == 2 && left[0].contains("GPU instance 1g.5gb") && left[1].contains("0000:3b:00.1"))
        #expect(try host.takeBackUnfinished(ofDomain: "web") == left)
        #expect(machine.instances("3b").count == 1)
        #expect(try host.records() == [made] && machine.ledger.reservations().map(\.owner.domain) == ["kept"])
        #expect(try host.unfinished(ofDomain: "web").isEmpty)
    }

    /// nvidia-smi that fails without saying so.
    @Test(arguments: ["*-dgi*) exit 0", "*-lgi*) echo 'Driver/library version mismatch'; exit 0"])
    func anInstanceThatIsStillThere(_ lie: String) throws {
        let machine = try VgpuMachine()
        try machine.migGPU("3b")
        let host = machine.host()
        _ = try host.create(VgpuProfile("A100-1-5C"), for: web, device: "gpu0")
        try machine.program("nvidia-smi", "case \"$*\" in \(lie);; esac; exec python3 -SE $D/bin/mig.py $D \"$@\"")
        #expect(failure { try host.destroy(of: web) } != nil)
        #expect(try host.migs.read().made.count == 1 && machine.instances("3b").count == 1)
        try machine.program("nvidia-smi", "exec python3 -SE $D/bin/mig.py $D \"$@\"")
        try host.destroy(of: web)
        #expect(try host.migs.read().made.isEmpty && machine.instances("3b").isEmpty)
    }

    /// What makes no vGPUs is not touched for one.
    @Test func onlyGPUs() throws {
        let machine = try vendor()
        let nic = "bus/pci/devices/0000:18:00.0"
        for (name, text) in [
            "vendor": "0x8086\n", "class": "0x020000\n", "sriov_totalvfs": "63\n", "sriov_numvfs": "0\n",
        ] {
            try machine.put("\(nic)/\(name)", text)
        }
        try machine.vendorGPU("af", types: ["NVIDIA A40-2Q 558"])
        let link = machine.sysfs.path("bus/pci/devices/0000:af:00.0/driver")
        try #require(symlink("../../drivers/vfio-pci", link) == 0)
        try machine.function("0000:b0:00.0", ["class": "0x030200\n"])
        try machine.ledger.reserve([GPUResource(function: pci("0000:5e:00.0"))], for: web)
        let host = machine.host()
        let other = GPUOwner(domain: "other", migration: "", fence: 0)
        for (address, why) in [
            ("0000:18:00.0", "is no GPU (class 02)"), ("0000:99:00.0", "no PCI device"),
            ("0000:3b:00.1", "virtual function of"),
            ("0000:af:00.0", "as a whole, on vfio-pci"), ("0000:5e:00.0", "reserved for domain web as a whole"),
            ("0000:b0:00.0", "has no virtual functions to turn on"),
        ] {
            let gpu = try pci(address)
            let before = machine.calls.count
            let enabling = failure {
                try host.set([(gpu, .virtualFunctions(true))]) { try DeviceTree(machine.sysfs) }
            }
            // Others' functions a person may turn on by the kernel's own way, which this stand-in does not go.
            let said = address == "0000:18:00.0" ? "although they were turned on" : why
            #expect(enabling?.message.contains(said) == true, "\(enabling.map { "\($0)" } ?? address)")
            #expect(machine.calls.count == before)
            guard address != "0000:b0:00.0" else { continue }
            try machine.put("\(nic)/sriov_numvfs", "0\n")
            for refused in [
                failure { try host.set([(gpu, .mixedSizes(true))]) { try DeviceTree(machine.sysfs) } },
                failure { _ = try host.create(small, for: other, device: "gpu0", on: gpu) },
                failure { _ = try host.plan(create: small, for: other, device: "gpu0", on: gpu) },
            ] { #expect(refused?.message.contains(why) == true, "\(refused.map { "\($0)" } ?? address)") }
            #expect(machine.calls.count == before)
        }
        #expect(machine.sysfs.text("\(nic)/sriov_numvfs") == "0")
    }

    /// On, and not the vendor's: turning on does nothing, and says so.
    @Test func functionsThatTheDriverDidNotTake() throws {
        let machine = try vendor()
        let gpu = try pci("0000:3b:00.0")
        for number in 1...3 { try Files.remove(machine.sysfs.path("bus/pci/devices/0000:3b:00.\(number)/nvidia")) }
        let refused = failure { try machine.host().enableVirtualFunctions(of: gpu) }
        #expect(refused?.message.contains("has taken none of them") == true)
        #expect(refused?.hint?.contains("--disable 0000:3b:00.0, then --enable") == true)
    }
}
