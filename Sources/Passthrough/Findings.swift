package import FlotillaProtocol

extension Finding {
    package static func make(_ severity: Severity, _ subject: String, _ message: String, remedy: String) -> Finding {
        var finding = Finding()
        finding.severity = severity
        finding.subject = subject
        finding.message = message
        finding.remedy = remedy
        return finding
    }

    package static func blocked(_ subject: String, _ message: String, remedy: String) -> Finding {
        make(.blocked, subject, message, remedy: remedy)
    }

    package static func warning(_ subject: String, _ message: String, remedy: String) -> Finding {
        make(.warning, subject, message, remedy: remedy)
    }
}

extension PciId {
    /// "10de:20f1", as lspci writes it.
    package var text: String { "\(padded(vendor, 4)):\(padded(device, 4))" }
}

extension AssignedDevice {
    /// "gpu0 (NVIDIA A100, 10de:20f1)", "gpu1 (vGPU grid_a100-40c)".
    package var text: String {
        var what = idTexts.joined(separator: " or ")
        if case .vgpu(let vgpu) = backing { what = "vGPU \(vgpu.profile)" }
        let parts = [name, what].filter { !$0.isEmpty }
        return parts.isEmpty ? id : "\(id) (\(parts.joined(separator: ", ")))"
    }

    /// The ids any of which serves the VM. Empty for backings that aren't a whole PCI device, and where the source
    /// doesn't say.
    package var allowedIDs: [PciId] {
        switch backing {
        case .passthrough(let device): device.id.vendor == 0 ? [] : [device.id]
        case .dynamic(let pool): pool.allowed.filter { $0.vendor != 0 }
        default: []
        }
    }

    /// Each once: such that differ by what isn't told, as their subsystem, are one.
    package var idTexts: [String] {
        var seen: Set<String> = []
        return allowedIDs.map(\.text).filter { seen.insert($0).inserted }
    }

    /// Class 03 (display), or not known.
    var mayBeDisplay: Bool { classCode == 0 || classCode >> 8 == 0x03 }
}

extension PciFunction {
    package var isDisplay: Bool { classCode >> 8 == 0x03 }

    /// "0000:3b:00.0 (10de:20f1, nvidia)".
    package var text: String {
        "\(address) (\(id.text), \(driver.isEmpty ? "no driver" : driver))"
    }
}

extension HostProfile {
    /// What switches the IOMMU on. AMD's driver is on by default once the firmware offers it, and so is Arm's.
    package var iommuRemedy: String {
        if ["aarch64", "arm64"].contains(where: kernel.contains) {
            return "enable the SMMU in the firmware, boot the host"
        }
        let words =
            switch pciFunctions.first(where: { $0.address == "0000:00:00.0" })?.id.vendor {
            case 0x8086: "`intel_iommu=on iommu=pt`"
            case 0x1022: "`iommu=pt` (and no `amd_iommu=off`)"
            default: "`intel_iommu=on iommu=pt` (Intel) or `iommu=pt` (AMD)"
            }
        return "enable VT-d or AMD-Vi (on Arm: the SMMU) in the firmware, boot the host with \(words)"
    }
}
