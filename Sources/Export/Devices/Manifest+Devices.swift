package import FlotillaProtocol
import MigrationModel

extension Manifest {
    /// Files each device under GPUs or other devices; none is left out.
    ///
    /// - Throws: `invalidArgument` for more devices than any VM has.
    package mutating func assign(_ groups: [PassthroughKeys]) throws {
        guard groups.count <= 256 else {
            throw MigrationError(.invalidArgument, "VM \(vm.name.printable): has \(groups.count) passthrough devices")
        }
        var found: [(device: AssignedDevice, kind: GPUKind)] = []
        for var keys in groups {
            if let device = keys.device(findings: &self) { found.append(device) }
        }
        for (device, kind) in found {
            let companion = kind == .gpu && device.classCode == 0 && isCompanion(device, among: found.map(\.device))
            if kind == .gpu && !companion {
                var gpu = device
                gpu.id = "gpu\(gpus.count)"
                if gpu.config.keys.contains(where: { $0.lowercased() == "cfg.gpu-pci-id" }) {
                    note(gpu.id, "\(gpu.label).cfg.gpu-pci-id names a device of the source host; not for another host")
                }
                gpus.append(gpu)
                continue
            }
            var other = device
            other.id = "device\(otherDevices.count)"
            otherDevices.append(other)
            if companion {
                note(other.id, "\(other.label) is a further function of a GPU (audio or USB) and moves with it")
            } else if kind == .unknown {
                warn(
                    other.id, "\(other.label): its class is not stated and its vendor doesn't tell what it is",
                    remedy: "map it to a device of the target by hand, or remove it on the source")
            } else {
                warn(
                    other.id,
                    "\(other.label) is a passthrough device that is no GPU (class 0x"
                        + "\(PCIText.hexadecimal(other.classCode, 4)))",
                    remedy: "map it to a device of the target by hand, or remove it on the source")
            }
        }
    }

    /// A function other than 0 whose function 0 is assigned as well: a GPU's audio or USB part.
    private func isCompanion(_ device: AssignedDevice, among all: [AssignedDevice]) -> Bool {
        let address = device.passthrough.address
        guard !address.isEmpty, !address.hasSuffix(".0") else { return false }
        let first = address.dropLast() + "0"
        return all.contains { $0.passthrough.address == first }
    }

    /// Files what else the source's configuration says about GPUs and the hypervisor's visibility. Everything else,
    /// secrets of the guest among it, stays behind.
    package mutating func keepExtraConfiguration(_ key: String, _ value: String) {
        let lower = key.lowercased()
        let exact: Set<String> = [
            "hypervisor.cpuid.v0", "vhv.enable", "vvtd.enable", "smbios.reflecthost", "sched.mem.pin",
            "mks.enable3d", "svga.present", "svga.vramsize", "svga.graphicsmemorykb", "tools.synctime",
            "monitor_control.restrict_backdoor", "numa.nodeaffinity", "firmware.smbios.uuid.mixedendian",
        ]
        let prefixes = ["pcipassthru.", "time.synchronize.", "cpuid.", "rtc.", "vgpu.", "sched.cpu.latency"]
        if exact.contains(lower) || prefixes.contains(where: { lower.hasPrefix($0) }) { extraConfig[key] = value }
        if lower == "hypervisor.cpuid.v0", value.asFlag == false { vm.hypervisorHidden = true }
    }

    /// Splits `pciPassthru12.cfg.enable_uvm` into 12 and `cfg.enable_uvm`; nil for other keys.
    package static func passthroughKey(_ key: String) -> (index: Int, key: String)? {
        guard key.lowercased().hasPrefix("pcipassthru"), let dot = key.firstIndex(of: ".") else { return nil }
        let digits = key[..<dot].dropFirst("pciPassthru".count)
        guard !digits.isEmpty, digits.count <= 4, digits.allSatisfy({ $0.isASCII && $0.isNumber }),
            let index = Int(digits)
        else { return nil }
        return (index, String(key[key.index(after: dot)...]))
    }
}
