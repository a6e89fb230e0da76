import FlotillaProtocol
import MigrationModel

/// Which GPU instance a vGPU lives on.
///
/// Source: NVIDIA's vGPU user guide, "Virtual GPU Types": several may share an instance (DC-4-24Q: four on 4g.96gb+gfx), all
/// of them of one size. The driver tells, since it knows of sharing; the name alone tells only of those that don't share.
extension Mig {
    /// Its driver says of every vGPU profile which kind of instance it lives on.
    var tellsVgpus: Bool { profiles.contains { !$0.vgpus.isEmpty } }

    /// The kind of instance it needs on this GPU, and how many of it fit one; nil where nobody tells.
    func home(of profile: VgpuProfile) -> (name: String, share: UInt32)? {
        for kind in profiles {
            if let share = kind.vgpus[profile.key] { return (kind.name, share) }
        }
        guard let name = profile.gpuInstance, !tellsVgpus else { return nil }
        // A GPU that has instances for graphics makes vGPUs on those alone.
        return ["\(name)+gfx", name].first { name in
            self.profile(name) != nil || instances.contains { $0.name == name }
        }.map { ($0, 1) }
    }

    /// One more of it fits the instances there are, beside these vGPUs of the GPU; nil stands for one of an unknown profile.
    func hasPlace(for profile: VgpuProfile, beside there: [VgpuProfile?]) -> Bool {
        guard let home = home(of: profile) else { return false }
        let mine = there.count { $0 == profile }
        let has = instances.count { $0.name == home.name }
        if mine % Int(home.share) != 0, has > 0 { return true }
        // Those of one profile are on as few as they can be.
        var used = there.count { $0 == nil }
        for (other, count) in Dictionary(grouping: there.compactMap(\.self), by: \.self).mapValues(\.count) {
            guard let place = self.home(of: other), place.name == home.name else { continue }
            used += (count + Int(place.share) - 1) / Int(place.share)
        }
        return has > used
    }

    /// One of these vGPUs may be on any instance of this name: the driver doesn't say which, and it takes several.
    func mayShare(_ name: String, with there: [VgpuProfile?]) -> Bool {
        guard let kind = profile(name), kind.vgpus.values.contains(where: { $0 > 1 }) else { return false }
        return there.contains { other in other.map { kind.vgpus[$0.key] ?? 0 > 1 } ?? true }
    }
}

/// Why no instance can be made for a vGPU that has no `home` on this GPU, and what a person does.
func missingHome(of profile: VgpuProfile, _ mig: Mig, _ gpu: String) -> (found: String, remedy: String) {
    if mig.tellsVgpus {
        let names = Set(mig.profiles.flatMap { $0.vgpus.keys.map { $0.uppercased() } }).sorted()
        return (
            "\(gpu) has no vGPU profile \(profile) in MIG mode",
            "choose one of \(names.joined(separator: ", ")), or another GPU"
        )
    }
    return (
        "\(gpu) has no GPU instance profile \(profile.gpuInstance ?? ""), and nvidia-smi does not tell on which other a "
            + "vGPU \(profile) lives; it has "
            + mig.profiles.map(\.name).sorted().joined(separator: ", "),
        "look the instance up in NVIDIA's table of vGPU types, make it by hand (nvidia-smi mig -i \(gpu) -lgip lists the "
            + "IDs, nvidia-smi mig -i \(gpu) -cgi ID -C makes one), and try again"
    )
}
