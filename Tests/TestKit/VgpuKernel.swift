import Glibc
import HostKit
import MigrationModel
package import Passthrough

/// A tree with NVIDIA's vGPU attributes as its user guide lays them out, the driver behind them, and stand-ins for the
/// vendor's programs. No NVIDIA card was at hand.
package struct VgpuMachine: Sendable {
    package let folder: TemporaryFolder
    package let sysfs: Sysfs
    package let kernel: VgpuKernel
    package let tools: VgpuTools

    package init(_ kernel: (Sysfs) -> VgpuKernel = { VgpuKernel(sysfs: $0) }) throws {
        folder = try TemporaryFolder("sys/bus/pci/devices", "sys/bus/mdev/devices", "bin", "state")
        sysfs = Sysfs(root: "\(folder.path)/sys")
        self.kernel = kernel(sysfs)
        tools = VgpuTools(folders: ["\(folder.path)/bin"])
    }

    package func host(boot: String = "boot-1") -> VgpuHost { Self.host(folder.path, kernel, boot: boot) }

    /// As another process has it.
    package static func host(_ folder: String, _ kernel: VgpuKernel? = nil, boot: String = "boot-1") -> VgpuHost {
        let sysfs = Sysfs(root: "\(folder)/sys")
        return VgpuHost(
            sysfs: sysfs, kernel: kernel ?? VgpuKernel(sysfs: sysfs), tools: VgpuTools(folders: ["\(folder)/bin"]),
            folder: "\(folder)/state", boot: boot)
    }

    package var ledger: GPULedger { GPULedger(folder: "\(folder.path)/state") }

    package func put(_ attribute: String, _ text: String) throws { try kernel.set(attribute, text) }

    package func program(_ name: String, _ script: String) throws {
        try Files.writeAtomically(
            Array(
                "#!/bin/sh\nS=\(folder.path)/sys D=\(folder.path)\necho \"\(name) $*\" >> $D/calls\n\(script)\n".utf8),
            to: "\(folder.path)/bin/\(name)", mode: 0o755)
    }

    package var calls: [String] {
        let bytes = (try? Files.read("\(folder.path)/calls")) ?? []
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").map(String.init)
    }

    package func function(_ address: String, _ extra: [String: String] = [:]) throws {
        try put("bus/pci/devices/\(address)/vendor", "0x10de\n")
        for (name, text) in extra { try put("bus/pci/devices/\(address)/\(name)", text) }
    }

    /// A physical function whose virtual ones appear by `sriov-manage -e`.
    package func vendorGPU(_ bus: String, types: [String], virtualFunctions: Int = 3) throws {
        let gpu = "0000:\(bus):00.0"
        try function(gpu, ["sriov_totalvfs": "\(virtualFunctions)\n", "sriov_numvfs": "0\n"])
        let list = types.joined(separator: "\\n")
        try program(
            "sriov-manage",
            """
            [ "$1" = -e ] || exit 2
            for n in $(seq 1 \(virtualFunctions)); do
              v=$S/bus/pci/devices/${2%.0}.$n; mkdir -p $v/nvidia; echo 0x10de > $v/vendor
              ln -s ../$2 $v/physfn; ln -s ../${2%.0}.$n $S/bus/pci/devices/$2/virtfn$((n-1))
              printf '\(list)\\n' > $v/nvidia/creatable_vgpu_types; echo 0 > $v/nvidia/current_vgpu_type
              : > $v/nvidia/vgpu_params
            done
            """)
    }

    /// Takes a `vendorGPU`'s virtual functions, and the mode that mixes sizes.
    package func reboot(_ bus: String) throws {
        let gpu = "bus/pci/devices/0000:\(bus):00.0"
        for link in sysfs.list(gpu) where link.hasPrefix("virtfn") {
            try Files.remove(sysfs.path("bus/pci/devices/\(sysfs.linkName("\(gpu)/\(link)") ?? "")"))
            try Files.remove(sysfs.path("\(gpu)/\(link)"))
        }
        try Files.remove(sysfs.path("mixed"))
    }

    /// mdevctl's bookkeeping: a file for each device that it makes again.
    package func mdevctl() throws {
        try program(
            "mdevctl",
            """
            mkdir -p $D/mdevctl.d
            case "$1" in
            define) [ -e $D/mdevctl.d/$4 ] && { echo "Device $4 is already defined"; exit 1; }; : > $D/mdevctl.d/$4;;
            undefine) [ -e $D/locked ] && { echo 'Read-only file system'; exit 1; }
                      rm $D/mdevctl.d/$3 2>/dev/null || { echo "No such device $3"; exit 1; };;
            list) [ ! -e $D/mdevctl.d/$4 ] || echo "$4 0000:af:00.0 nvidia-222 auto (defined)";;
            esac
            """)
    }

    package var keptByMdevctl: [String] { (try? Files.list("\(folder.path)/mdevctl.d")) ?? [] }

    package func mdevGPU(_ gpu: String, _ types: [(id: String, name: String, available: Int)]) throws {
        try function(gpu)
        for type in types {
            let folder = "bus/pci/devices/\(gpu)/mdev_supported_types/\(type.id)"
            try put("\(folder)/name", "\(type.name)\n")
            try put("\(folder)/available_instances", "\(type.available)\n")
            try put("\(folder)/create", "")
        }
    }
}

package struct VgpuKernel: SysfsWriter {
    package let sysfs: Sysfs
    /// These functions take a type without an error, and don't.
    package var deaf: Set<String> = []
    /// vGPUs that a GPU holds on the vendor's path.
    package var capacity = 2

    package init(sysfs: Sysfs, deaf: Set<String> = [], capacity: Int = 2) {
        (self.sysfs, self.deaf, self.capacity) = (sysfs, deaf, capacity)
    }

    package func set(_ attribute: String, _ text: String) throws {
        let path = sysfs.path(attribute)
        try Files.createDirectories(Files.parent(of: path))
        try Files.writeAtomically(Array(text.utf8), to: path)
    }

    package func write(_ text: String, to attribute: String) throws {
        let value = text.hasSuffix("\n") ? String(text.dropLast()) : text
        let parts = attribute.split(separator: "/").map(String.init)
        if attribute.hasSuffix("/create") {
            let folder = Files.parent(of: attribute)
            let left = sysfs.number("\(folder)/available_instances") ?? 0
            guard left > 0 else { throw MigrationError(.internal, "no space left on device") }
            try set("\(folder)/available_instances", "\(left - 1)\n")
            try set("bus/pci/devices/\(parts[3])/\(value)/type", "\(folder)\n")
            try set("bus/mdev/devices/\(value)/parent", "\(parts[3]) \(folder)\n")
            try set("bus/mdev/devices/\(value)/nvidia/vgpu_params", "")
        } else if attribute.hasSuffix("/remove") {
            let parent = (sysfs.text("bus/mdev/devices/\(parts[3])/parent") ?? "").split(separator: " ").map(
                String.init)
            let left = sysfs.number("\(parent[1])/available_instances") ?? 0
            try set("\(parent[1])/available_instances", "\(left + 1)\n")
            try Files.remove(sysfs.path("bus/mdev/devices/\(parts[3])"))
            try Files.remove(sysfs.path("bus/pci/devices/\(parent[0])/\(parts[3])"))
        } else if attribute.hasSuffix("/current_vgpu_type") {
            let types = "bus/pci/devices/\(parts[3])/nvidia/creatable_vgpu_types"
            let offered = String(decoding: sysfs.bytes(types) ?? [], as: UTF8.self)
            if value != "0", isPartitioned(parts[3]), !offered.contains(" \(value)\n") {
                throw MigrationError(.internal, "invalid argument")
            }
            if !deaf.contains(parts[3]) { try set(attribute, text) }
            try fill()
        } else {
            guard Files.exists(sysfs.path(attribute)) else { throw MigrationError(.notFound, "no \(attribute)") }
            try set(attribute, text)
        }
    }

    private var home: String { Files.parent(of: sysfs.root) }

    /// Its GPU's instances say what it offers: see `migGPU`.
    private func isPartitioned(_ function: String) -> Bool {
        sysfs.linkName("bus/pci/devices/\(function)/physfn").map { Files.exists("\(home)/mig/\($0)") } ?? false
    }

    /// A full GPU offers nothing any more; one in use only what it holds already (time-sliced), unless sizes are mixed.
    func fill() throws {
        let functions = sysfs.list("bus/pci/devices").filter {
            sysfs.exists("bus/pci/devices/\($0)/nvidia/current_vgpu_type") && !isPartitioned($0)
        }
        let program = "\(home)/bin/mig.py"
        if Files.exists(program) { _ = try Program.run("/usr/bin/python3", ["-SE", program, home, "refresh"]) }
        for function in functions {
            let parent = sysfs.linkName("bus/pci/devices/\(function)/physfn")
            let siblings = functions.filter { sysfs.linkName("bus/pci/devices/\($0)/physfn") == parent }
            let used = siblings.filter { sysfs.text("bus/pci/devices/\($0)/nvidia/current_vgpu_type") != "0" }
            let list = "bus/pci/devices/\(function)/nvidia/creatable_vgpu_types"
            if !sysfs.exists("\(list).all") {
                try set("\(list).all", String(decoding: sysfs.bytes(list) ?? [], as: UTF8.self))
            }
            let all = String(decoding: sysfs.bytes("\(list).all") ?? [], as: UTF8.self).split(separator: "\n")
            let type = used.first.flatMap { sysfs.text("bus/pci/devices/\($0)/nvidia/current_vgpu_type") }
            let offered =
                used.count >= capacity
                ? [] : all.filter { type == nil || sysfs.exists("mixed") || $0.contains(type ?? "") }
            try set(list, offered.map { "\($0)\n" }.joined())
        }
    }
}
