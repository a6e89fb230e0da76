/// A program that this host's devices are worked with.
package struct NeededProgram: Sendable, Equatable {
    package let name: String
    /// Where it lies; nil: it is in none of the usual folders.
    package let path: String?
    /// What can't be done without it.
    package let without: String
    package let remedy: String
}

extension VgpuHost {
    /// What its vGPUs need: none on a host without any, and none of the vendor's where its driver is not at work.
    package func neededPrograms() -> [NeededProgram] {
        let places = places()
        let nvidia = sysfs.list("bus/pci/devices").map { "bus/pci/devices/\($0)" }
            .filter { sysfs.number("\($0)/vendor") == 0x10de && sysfs.linkName("\($0)/driver") == "nvidia" }
        let driver = "the vendor's vGPU host driver brings it; a host that makes no vGPUs needs none"
        var programs: [NeededProgram] = []
        func need(_ name: String, without: String, remedy: String) {
            programs.append(NeededProgram(name: name, path: tools.find(name), without: without, remedy: remedy))
        }
        if !nvidia.isEmpty {
            need("nvidia-smi", without: "no MIG instances and no mixed sizes of vGPUs can be made", remedy: driver)
        }
        if nvidia.contains(where: { sysfs.number("\($0)/sriov_totalvfs").map { $0 > 0 } ?? false }) {
            need("sriov-manage", without: "virtual functions of GPUs can't be switched on", remedy: driver)
        }
        if places.contains(where: { $0.path == .mdev }) {
            need(
                "mdevctl", without: "after a reboot only flotilla gpu restore makes vGPUs again",
                remedy: "install mdevctl, or enable flotilla-vgpu.service")
        }
        return programs
    }
}
