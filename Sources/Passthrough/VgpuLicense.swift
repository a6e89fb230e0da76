package import FlotillaProtocol

/// What a guest needs so that its vGPU is licensed: NVIDIA's driver throttles one that is not. Nothing of it is put into the
/// guest: the token is the site's own, and a migration writes into no guest's file system.
///
/// Source: NVIDIA's Client Licensing User Guide.
package struct VgpuLicense: Sendable {
    package struct File: Sendable, Equatable {
        package var path: String
        /// Nil for the site's own: the token names its license server, and is told to nobody.
        package var content: String?
        /// Nil on Windows.
        package var mode: String?
    }

    /// The edition that is drawn.
    package let product: String
    package let files: [File]
    /// What reads them.
    private let service: String
    private let isWindows: Bool

    /// Nil for a profile that isn't NVIDIA's.
    package init?(_ profile: VgpuProfile, windows: Bool) {
        switch profile.series {
        case "c": product = "NVIDIA AI Enterprise or Virtual Compute Server"
        case "q": product = "NVIDIA RTX Virtual Workstation"
        case "b": product = "NVIDIA Virtual PC"
        case "a": product = "NVIDIA Virtual Applications"
        default: return nil
        }
        isWindows = windows
        let token = "client_configuration_token.tok"
        if windows {
            files = [
                File(path: #"C:\Program Files\NVIDIA Corporation\vGPU Licensing\ClientConfigToken\"# + token)
            ]
            service = "restart the service NVDisplay.ContainerLocalSystem"
        } else {
            files = [
                // 1: a vGPU, whichever; its driver draws what its series needs. 2 and 4 are for whole GPUs.
                File(path: "/etc/nvidia/gridd.conf", content: "FeatureType=1\n", mode: "0644"),
                File(path: "/etc/nvidia/ClientConfigToken/\(token)", mode: "0744"),
            ]
            service = "systemctl restart nvidia-gridd"
        }
    }

    /// What a person has to do, in one sentence.
    package var remedy: String {
        let steps = files.map { file in
            let mode = file.mode.map { " (mode \($0))" } ?? ""
            return file.content.map {
                "write \($0.split(separator: "\n").joined(separator: ", ")) to \(file.path)\(mode)"
            }
                ?? "copy the site's client configuration token to \(file.path)\(mode)"
        }
        // FeatureType in HKLM\SOFTWARE\NVIDIA Corporation\Global\GridLicensing is for whole GPUs only.
        let registry = isWindows ? ", with no change to the registry" : ""
        return
            "in the source VM before it moves, or in the guest: \(steps.joined(separator: ", "))\(registry); then \(service)"
    }
}

/// Where the guest looks for the licenses of these devices, each file once.
package func vgpuLicenseFiles(_ devices: [AssignedDevice], windows: Bool) -> [String] {
    var paths: [String] = []
    for device in devices {
        let license = VgpuLicense(VgpuProfile(device.vgpu.profile), windows: windows)
        for file in license?.files ?? [] where !paths.contains(file.path) { paths.append(file.path) }
    }
    return paths
}

/// What becomes of each vGPU's license and parameters.
package func vgpuFindings(_ devices: [AssignedDevice], windows: Bool) -> [Finding] {
    devices.map { device in
        let profile = VgpuProfile(device.vgpu.profile)
        let license = VgpuLicense(profile, windows: windows)
        let left = device.config.keys.filter { key in
            key.hasPrefix("cfg.") && key != "cfg.gpu-pci-id"
                && vgpuParameters(of: [key: device.config[key] ?? ""]).isEmpty
        }.sorted()
        let drawn = license.map {
            ", which draws a license of \($0.product) in the guest; its files travel with the VM's disks if they are there, "
                + "else nobody puts them there"
        }
        return .make(
            .note, device.id,
            "\(device.id) becomes a vGPU \(profile)\(drawn ?? "")"
                + (left.isEmpty ? "" : "; not carried: \(left.joined(separator: ", "))"),
            remedy: license?.remedy ?? "")
    }
}
