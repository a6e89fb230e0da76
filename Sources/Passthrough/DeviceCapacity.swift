package import FlotillaProtocol

/// A host's devices as VM after VM takes its own: what it can serve to one VM it may not serve to all.
extension HostProfile {
    /// Marks what the VM will have of this host; nothing when the host can't serve it.
    ///
    /// - Returns: whether it could be served with what those before it left.
    @discardableResult
    package mutating func take(_ manifest: Manifest, _ options: DeployOptions) -> Bool {
        let match = deviceMatch(manifest: manifest, options: options, host: self)
        guard match.isComplete else { return false }
        let taken = Set(match.devices.joined().map(\.address))
        for index in pciFunctions.indices where taken.contains(pciFunctions[index].address) {
            if pciFunctions[index].inUseBy.isEmpty { pciFunctions[index].inUseBy = promise(manifest) }
        }
        // Those it has already are no longer to be made.
        var made = vgpus.filter { $0.migrationID == manifest.migrationID && !manifest.migrationID.isEmpty }
        for device in match.vgpus {
            let profile = VgpuProfile(device.vgpu.profile)
            if let index = made.firstIndex(where: { VgpuProfile($0.profile) == profile }) {
                made.remove(at: index)
            } else {
                _ = takeVgpu(profile, for: promise(manifest))
            }
        }
        return true
    }

    private func promise(_ manifest: Manifest) -> String { "VM \(manifest.vm.name), which goes first" }
}
