import Glibc
import HostKit
import Passthrough
import TestKit
import Testing

/// Which programs a host's devices need.
@Suite struct VgpuProgramsTests {
    private func bind(_ gpu: String, to driver: String, _ machine: VgpuMachine) throws {
        try Files.createDirectories(machine.sysfs.path("bus/pci/drivers/\(driver)"))
        try #require(symlink("../../drivers/\(driver)", machine.sysfs.path("bus/pci/devices/\(gpu)/driver")) == 0)
    }

    @Test func hostWithoutVgpusNeedsNone() throws {
        let machine = try VgpuMachine()
        try machine.function("0000:3b:00.0", ["sriov_totalvfs": "16\n"])
        try bind("0000:3b:00.0", to: "vfio-pci", machine)
        #expect(machine.host().neededPrograms().isEmpty)
    }

    @Test func vendorsProgramsAreNeededWhereItsDriverWorks() throws {
        let machine = try VgpuMachine()
        try machine.vendorGPU("3b", types: ["NVIDIA A40-2Q 558"])
        try bind("0000:3b:00.0", to: "nvidia", machine)
        let needed = machine.host().neededPrograms()
        #expect(needed.map(\.name) == ["nvidia-smi", "sriov-manage"])
        #expect(needed.map(\.path) == [nil, "\(machine.folder.path)/bin/sriov-manage"])
        #expect(needed.allSatisfy { !$0.without.isEmpty && !$0.remedy.isEmpty })
    }

    @Test func mediatedDevicesNeedMdevctl() throws {
        let machine = try VgpuMachine()
        try machine.mdevGPU("0000:af:00.0", [("nvidia-222", "GRID T4-1B", 4)])
        #expect(machine.host().neededPrograms().map(\.name) == ["mdevctl"])
        try machine.mdevctl()
        #expect(machine.host().neededPrograms().map(\.path) == ["\(machine.folder.path)/bin/mdevctl"])
    }
}
