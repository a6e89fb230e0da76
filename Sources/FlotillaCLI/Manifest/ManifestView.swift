import FlotillaProtocol
import MigrationModel
import Passthrough

/// A manifest for people.
struct ManifestView {
    private let manifest: Manifest

    init(_ manifest: Manifest) { self.manifest = manifest }

    var text: String {
        let vm = manifest.vm
        var lines = ["\(vm.name)"]
        var facts = [
            "\(vm.cpu.count) CPUs", byteText(vm.memory.bytes), vm.firmware == .efi ? "EFI" : "BIOS",
            vm.secureBoot ? "Secure Boot" : "", vm.tpm ? "TPM" : "", vm.encrypted ? "encrypted" : "",
            vm.hypervisorHidden ? "hypervisor hidden" : "",
        ].filter { !$0.isEmpty }
        if !vm.guestFullName.isEmpty || !vm.guestID.isEmpty {
            facts.append(vm.guestFullName.isEmpty ? vm.guestID : vm.guestFullName)
        }
        lines.append("  " + facts.joined(separator: ", "))
        if !vm.biosUuid.isEmpty { lines.append("  UUID \(vm.biosUuid)") }
        if !vm.tags.isEmpty {
            lines.append("  tags " + vm.tags.map { "\($0.category): \($0.name)" }.joined(separator: ", "))
        }
        if !manifest.source.url.isEmpty { lines.append("  from \(manifest.source.url)") }
        if !manifest.disks.isEmpty {
            lines += table(
                ["disk", "size", "format", "mode", "file"],
                manifest.disks.map {
                    [
                        $0.id, byteText($0.capacityBytes),
                        $0.source.variant.isEmpty ? $0.source.format : $0.source.variant,
                        $0.mode, $0.source.member.isEmpty ? $0.source.path : $0.source.member,
                    ]
                })
        }
        if !manifest.nics.isEmpty {
            lines += table(
                ["NIC", "model", "MAC", "network", "addresses"],
                manifest.nics.map {
                    [
                        $0.id, $0.model, $0.mac, $0.network,
                        $0.addresses.map { "\($0.ip)/\($0.prefixLength)" }.joined(separator: ", "),
                    ]
                })
        }
        for device in manifest.gpus + manifest.otherDevices {
            lines.append("  \(device.id)  \(describe(device))")
            for (key, value) in device.config.sorted(by: { $0.key < $1.key }) {
                lines.append("        \(key) = \(value)")
            }
        }
        for (key, value) in manifest.extraConfig.sorted(by: { $0.key < $1.key }) { lines.append("  \(key) = \(value)") }
        for finding in manifest.findings {
            let word = finding.severity == .blocked ? "BLOCKED" : finding.severity == .warning ? "warning" : "note   "
            lines.append("  \(word)  \(finding.subject): \(finding.message)")
            if !finding.remedy.isEmpty { lines.append("           \(finding.remedy)") }
        }
        return lines.map { $0.withoutControls }.joined(separator: "\n") + "\n"
    }

    private func describe(_ device: AssignedDevice) -> String {
        let name = device.name.isEmpty ? "" : " \(device.name)"
        switch device.backing {
        case .passthrough(let one):
            let at = one.address.isEmpty ? one.rawAddress : one.address
            return "passthrough \(one.id.text)\(name)\(at.isEmpty ? "" : ", at \(at) on the source")"
        case .dynamic(let some):
            let label = some.customLabel.isEmpty ? "" : ", label \(some.customLabel)"
            return "dynamic, one of \(some.allowed.map(\.text).joined(separator: ", "))\(name)\(label)"
        case .vgpu(let vgpu): return "vGPU \(vgpu.profile)\(name)"
        case .dvx(let dvx): return "DVX \(dvx.deviceClass)\(name)"
        case .sriov(let function): return "SR-IOV virtual function \(function.id.text)\(name)"
        case nil: return "unknown"
        }
    }
}

extension String {
    /// Nothing a terminal would obey, nor what turns the text's direction.
    var withoutControls: String {
        String(
            String.UnicodeScalarView(
                unicodeScalars.map {
                    $0.properties.generalCategory == .control || $0.properties.isBidiControl ? "\u{FFFD}" : $0
                }))
    }
}
