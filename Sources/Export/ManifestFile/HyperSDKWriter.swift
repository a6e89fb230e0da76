package import FlotillaProtocol
import MigrationModel
import SwiftProtobuf

extension Manifest {
    /// HyperSDK's Artifact Manifest 1.0 of this VM, as JSON, ending in a line feed. What it has no fields for (GPUs,
    /// TPM, UUIDs, controllers) is told in its notes.
    ///
    /// Of a converted disk it names the image, else the source's file, as a path that is there.
    ///
    /// - Parameter size: of a file in bytes.
    /// - Throws: `failedPrecondition` for disks that are no files of their own, such as members of an OVA.
    package func hyperSDK(size: (String) throws -> UInt64) throws -> String {
        var root: [JSONTree.Member] = [.init("manifest_version", .string("1.0"))]
        var source: [JSONTree.Member] = [.init("provider", .string(source.kind == .vsphere ? "vsphere" : "local"))]
        func add(_ key: String, _ value: String, to members: inout [JSONTree.Member]) {
            if !value.isEmpty { members.append(.init(key, .string(value))) }
        }
        add("vm_id", self.source.vmMoid.isEmpty ? vm.instanceUuid : self.source.vmMoid, to: &source)
        add("vm_name", vm.name, to: &source)
        add("datacenter", self.source.datacenter, to: &source)
        if hasCapturedAt, capturedAt.nanos >= 0, let moment = try? capturedAt.jsonString() {
            add("export_timestamp", moment.filter { $0 != "\"" }, to: &source)
        }
        add("export_method", createdBy, to: &source)
        root.append(.init("source", .object(source)))

        let gigabytes = (vm.memory.bytes + (1 << 30) - 1) >> 30
        var machine: [JSONTree.Member] = [
            .init("cpu", .number("\(vm.cpu.count)")), .init("mem_gb", .number("\(gigabytes)")),
            .init("firmware", .string(vm.firmware == .efi ? "uefi" : "bios")),
            .init("secureboot", .bool(vm.secureBoot)),
        ]
        let family = (vm.guestID + vm.tools.family + vm.guestFullName).lowercased()
        // Not darwin.
        let isWindows = family.contains("windows") || family.hasPrefix("win")
        machine.append(.init("os_hint", .string(isWindows ? "windows" : "linux")))
        add("os_version", vm.guestFullName, to: &machine)
        root.append(.init("vm", .object(machine)))
        root.append(.init("disks", .array(try disks.enumerated().map { try hyperSDK($1, number: $0, size) })))
        root.append(
            .init(
                "nics",
                .array(
                    nics.map { nic in
                        var members: [JSONTree.Member] = [.init("id", .string(nic.id))]
                        add("mac", nic.mac, to: &members)
                        add("network", nic.network, to: &members)
                        return .object(members)
                    })))
        root.append(.init("notes", .array(hyperSDKNotes(gigabytes).map { .string($0) })))
        let warnings = findings.filter { $0.severity != .note }
        root.append(
            .init(
                "warnings",
                .array(
                    warnings.map {
                        .object([
                            .init("stage", .string("export")),
                            .init("message", .string("\($0.subject): \($0.message)")),
                        ])
                    })))
        return JSONTree.object(root).indented
    }

    private func hyperSDK(_ disk: Disk, number: Int, _ size: (String) throws -> UInt64) throws -> JSONTree {
        let converted = disk.hasTarget && !disk.target.path.isEmpty
        let path = converted ? disk.target.path : disk.source.path
        guard path.hasPrefix("/"), converted || disk.source.member.isEmpty && disk.source.offset == 0 else {
            throw MigrationError(
                .failedPrecondition, "\(disk.id) of \(vm.name.printable) is no file of its own",
                hint: "an Artifact Manifest names files: extract the OVA, or write it of a migrated VM")
        }
        let format = converted ? disk.target.format : disk.source.format
        guard let name = HyperSDKReader.formats.first(where: { $0.value == format })?.key else {
            throw MigrationError(
                .unimplemented, "\(disk.id): an Artifact Manifest knows no format '\(format.printable)'")
        }
        var members: [JSONTree.Member] = [
            .init("id", .string(disk.id)), .init("source_format", .string(name)),
            .init("bytes", .number("\(try size(path))")), .init("local_path", .string(path)),
        ]
        // Of the source's stream, which for a disk of several files is none of them.
        let digest =
            disk.source.sha256.isEmpty
            ? disk.source.expected.first { $0.algorithm == "sha256" }?.hex ?? "" : disk.source.sha256
        let bytes = try size(path)
        if !converted, !digest.isEmpty, disk.source.streamBytes == 0 || disk.source.streamBytes == bytes {
            members.append(.init("checksum", .string("sha256:\(digest.lowercased())")))
        }
        members.append(.init("boot_order_hint", .number("\(number)")))
        if !disk.label.isEmpty { members.append(.init("label", .string(disk.label))) }
        members.append(.init("disk_type", .string(number == 0 || disk.boot ? "boot" : "data")))
        return .object(members)
    }

    private func hyperSDKNotes(_ gigabytes: UInt64) -> [String] {
        var notes: [String] = []
        for device in gpus + otherDevices {
            let what =
                switch device.backing {
                case .vgpu(let vgpu): "vGPU \(vgpu.profile)"
                case .passthrough(let one):
                    "PCI \(PCIText.hexadecimal(one.id.vendor, 4)):\(PCIText.hexadecimal(one.id.device, 4))"
                case .dynamic(let some):
                    "one of PCI "
                        + some.allowed.map {
                            "\(PCIText.hexadecimal($0.vendor, 4)):\(PCIText.hexadecimal($0.device, 4))"
                        }.joined(separator: ", ")
                default: "a device"
                }
            notes.append("\(device.id): \(what) is not part of this manifest")
        }
        if vm.tpm { notes.append("the VM has a TPM, which is not part of this manifest") }
        if vm.memory.bytes != gigabytes << 30 {
            notes.append("memory is \(vm.memory.bytes >> 20) MiB, rounded up to whole GiB here")
        }
        return notes
    }
}
