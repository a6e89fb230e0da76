import FlotillaProtocol
import Glibc

extension Manifest {
    /// What a schema can't say: things that have to fit each other.
    func inconsistencies() -> [ManifestProblem] {
        idProblems() + machineProblems() + disks.enumerated().flatMap { diskProblems($1, "disks[\($0)]") }
            + placeProblems() + networkProblems() + deviceProblems()
    }

    private func idProblems() -> [ManifestProblem] {
        var seen: [String: String] = [:]
        let named: [(String, [String])] = [
            ("disks", disks.map(\.id)), ("nics", nics.map(\.id)), ("gpus", gpus.map(\.id)),
            ("otherDevices", otherDevices.map(\.id)),
        ]
        return named.flatMap { list, ids in
            ids.enumerated().compactMap { index, id in
                let path = "\(list)[\(index)].id"
                guard let first = seen[id] else {
                    seen[id] = path
                    return nil
                }
                return ManifestProblem(path, "'\(id)' is the id at \(first) too", "give each its own id")
            }
        }
    }

    private func machineProblems() -> [ManifestProblem] {
        var problems: [ManifestProblem] = []
        let cores = vm.cpu.coresPerSocket
        if cores > 1, vm.cpu.count % cores != 0 {
            problems.append(
                ManifestProblem(
                    "vm.cpu.coresPerSocket", "\(vm.cpu.count) CPUs are no multiple of \(cores) cores per socket",
                    "correct one of the two numbers"))
        }
        if vm.memory.bytes == 0 || vm.memory.bytes % (1 << 20) != 0 {
            problems.append(
                ManifestProblem(
                    "vm.memory.bytes", "\(vm.memory.bytes) bytes are no whole number of MiB above 0",
                    "write the memory in bytes, a multiple of 1048576"))
        }
        if vm.secureBoot, vm.firmware != .efi {
            problems.append(
                ManifestProblem(
                    "vm.secureBoot", "Secure Boot needs the firmware EFI", "set vm.firmware to EFI or leave it out"))
        }
        return problems
    }

    private func diskProblems(_ disk: Disk, _ path: String) -> [ManifestProblem] {
        var problems: [ManifestProblem] = []
        func add(_ field: String, _ message: String, _ remedy: String) {
            problems.append(ManifestProblem("\(path).\(field)", message, remedy))
        }
        if disk.capacityBytes == 0 || disk.capacityBytes % 512 != 0 || disk.capacityBytes > 1 << 50 {
            add(
                "capacityBytes", "\(disk.capacityBytes) bytes are no size of a disk",
                "write a multiple of 512 up to 2^50 (1 PiB)")
        }
        for (index, digest) in disk.source.expected.enumerated() {
            let digits = ["sha1": 40, "sha256": 64, "sha512": 128][digest.algorithm] ?? 0
            if digest.hex.count != digits {
                add(
                    "source.expected[\(index)].hex", "\(digest.hex.count) digits, a \(digest.algorithm) has \(digits)",
                    "correct the algorithm or the digest")
            }
        }
        if !disk.source.contentSha256.isEmpty, disk.source.contentChunkBytes == 0 {
            add("source.contentChunkBytes", "is missing though there is a contentSha256", "write the chunk's size")
        }
        if disk.hasTarget, !disk.target.path.hasPrefix("/") {
            add("target.path", "'\(disk.target.path.printable)' is no absolute path", "write where the image lies")
        }
        return problems
    }

    /// Two disks can't hang at one place.
    private func placeProblems() -> [ManifestProblem] {
        var seen: [String: Int] = [:]
        return disks.enumerated().compactMap { index, disk in
            guard disk.controller != .unspecified else { return nil }
            let kind =
                switch disk.controller {
                case .ide: "ide"
                case .sata: "sata"
                case .nvme: "nvme"
                default: "scsi"
                }
            let place = "\(kind)\(disk.busNumber):\(disk.unitNumber)"
            guard let first = seen[place] else {
                seen[place] = index
                return nil
            }
            return ManifestProblem(
                "disks[\(index)].unitNumber", "disks[\(first)] is at \(place) too", "give each its own bus and unit")
        }
    }

    private func networkProblems() -> [ManifestProblem] {
        var problems: [ManifestProblem] = []
        var owners: [String: Int] = [:]
        for (index, nic) in nics.enumerated() {
            let path = "nics[\(index)]"
            if !nic.mac.isEmpty {
                if (try? normalizedMAC(nic.mac, owner: path)) != nic.mac {
                    problems.append(
                        ManifestProblem(
                            "\(path).mac", "\(nic.mac) is no interface's address", "write the address of the card"))
                }
                if let first = owners.updateValue(index, forKey: nic.mac) {
                    problems.append(
                        ManifestProblem(
                            "\(path).mac", "nics[\(first)] has the address \(nic.mac) too", "give each its own"))
                }
            }
            for (number, address) in nic.addresses.enumerated() {
                let bits = Self.bits(of: address.ip)
                if bits == nil || address.prefixLength > bits ?? 0 {
                    problems.append(
                        ManifestProblem(
                            "\(path).addresses[\(number)]",
                            "\(address.ip.printable)/\(address.prefixLength) is no address with its prefix",
                            "write an IPv4 or IPv6 address and its prefix length"))
                }
            }
        }
        return problems
    }

    private static func bits(of address: String) -> UInt32? {
        var storage = in6_addr()
        if inet_pton(AF_INET, address, &storage) == 1 { return 32 }
        return inet_pton(AF_INET6, address, &storage) == 1 ? 128 : nil
    }

    private func deviceProblems() -> [ManifestProblem] {
        let lists = [("gpus", gpus, "gpu"), ("otherDevices", otherDevices, "device")]
        return lists.flatMap { list, devices, prefix in
            devices.enumerated().flatMap { index, device -> [ManifestProblem] in
                var problems: [ManifestProblem] = []
                let path = "\(list)[\(index)]"
                if !device.id.hasPrefix(prefix) {
                    problems.append(
                        ManifestProblem("\(path).id", "ids in \(list) begin with \(prefix)", "rename or move it"))
                }
                switch device.backing {
                case nil:
                    problems.append(
                        ManifestProblem(
                            path, "says nothing of what backs it",
                            "add passthrough, dynamic, vgpu, dvx or sriov"))
                case .vgpu(let vgpu) where vgpu.profile.isEmpty:
                    problems.append(
                        ManifestProblem("\(path).vgpu.profile", "is missing", "write it, like grid_a100-40c"))
                default: break
                }
                return problems
            }
        }
    }
}
