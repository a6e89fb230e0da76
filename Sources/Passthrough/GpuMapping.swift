package import FlotillaProtocol
import SwiftProtobuf
import MigrationModel

/// The device as it is to be on the target: the first mapping whose source fits it decides, without one it stays what it is.
/// Its settings stay with it.
package func mapped(_ device: AssignedDevice, by mappings: [GpuMapping]) -> AssignedDevice {
    guard let target = mappings.first(where: { $0.source.fits(device) })?.target.kind else { return device }
    var result = device
    switch target {
    case .id(let id):
        result.dynamic = .with { $0.allowed = [id] }
        result.name = ""
    case .profile(let profile): result.vgpu = .with { $0.profile = profile }
    }
    return result
}

/// All that the target is asked for, mapped. What the source gave of a mapped GPU's slot beside it, its audio, is no device
/// of its own any more: `mappingFindings` tells.
package func wantedDevices(_ manifest: Manifest, _ mappings: [GpuMapping]) -> [AssignedDevice] {
    let others = manifest.otherDevices.filter { mappedGPU(beside: $0, manifest, mappings) == nil }
    return (manifest.gpus + others).map { mapped($0, by: mappings) }
}

/// A note for each device that nothing is asked for since the GPU beside it becomes another.
func mappingFindings(_ manifest: Manifest, _ mappings: [GpuMapping]) -> [Finding] {
    manifest.otherDevices.compactMap { device in
        guard let gpu = mappedGPU(beside: device, manifest, mappings) else { return nil }
        var becomes = "\(gpu.vgpu.profile), and a vGPU has no such part"
        if case .dynamic(let target) = gpu.backing {
            becomes = "\(target.allowed.map(\.text).joined(separator: " or ")), and gets what that has in its slot"
        }
        return .make(
            .note, device.id, "\(device.text) is left out: \(gpu.id), beside which it is, becomes \(becomes)",
            remedy: "")
    }
}

/// The GPU of the same slot as it is on the target, where that is another.
private func mappedGPU(beside device: AssignedDevice, _ manifest: Manifest, _ mappings: [GpuMapping]) -> AssignedDevice?
{
    guard let slot = device.slot else { return nil }
    return manifest.gpus.first { gpu in gpu.slot == slot && mappings.contains { $0.source.fits(gpu) } }
        .map { mapped($0, by: mappings) }
}

extension AssignedDevice {
    /// Where a passed-through device is on the source: its functions share it. Nil where that is not known.
    var slot: String? {
        guard case .passthrough(let backing) = self.backing else { return nil }
        return PciAddress(backing.address).map { "\(backing.systemID) \($0.slotName)" }
    }
}

extension GpuKind {
    fileprivate func fits(_ device: AssignedDevice) -> Bool {
        switch (kind, device.backing) {
        case (.id(let id), .passthrough), (.id(let id), .dynamic):
            device.allowedIDs.contains { $0.vendor == id.vendor && $0.device == id.device }
        case (.profile(let profile), .vgpu(let vgpu)): VgpuProfile(profile) == VgpuProfile(vgpu.profile)
        default: false
        }
    }

    /// "10de:20f1" is a device, anything else a profile.
    package init?(parsing text: String) {
        self.init()
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        if parts.count == 2 {
            guard parts.allSatisfy({ $0.utf8.count == 4 }), let vendor = UInt32(parts[0], radix: 16), vendor != 0,
                let device = UInt32(parts[1], radix: 16)
            else { return nil }
            id = .with { ($0.vendor, $0.device) = (vendor, device) }
            return
        }
        let allowed = text.unicodeScalars.allSatisfy {
            $0.isASCII
                && ($0.properties.isAlphabetic || $0.properties.numericType != nil || " _-".unicodeScalars.contains($0))
        }
        guard allowed, text.contains("-"), text.utf8.count <= 64 else { return nil }
        profile = text
    }
}

/// Findings for each wanted vGPU, in order; empty for those that have room. Judged on the profile of the host: how full each
/// GPU is when the vGPU is made decides in the end.
///
/// - Parameters:
///   - taken: functions that go to the VM as a whole.
///   - migration: whose vGPUs of an earlier attempt serve again.
func vgpuFindings(
    _ wanted: [AssignedDevice], on host: HostProfile, taken: Set<String>, for migration: String
) -> [[Finding]] {
    var kept = host.vgpus.filter { !migration.isEmpty && $0.migrationID == migration }.map { VgpuProfile($0.profile) }
    var left = host
    return wanted.map { device in
        let profile = VgpuProfile(device.vgpu.profile)
        if let index = kept.firstIndex(of: profile) {
            kept.remove(at: index)
            return []
        }
        if left.takeVgpu(profile, besides: taken) { return [] }
        return [noRoom(for: device, profile, on: host, room: host.room(for: profile, besides: taken))]
    }
}

private func noRoom(for device: AssignedDevice, _ profile: VgpuProfile, on host: HostProfile, room: UInt32) -> Finding {
    let there =
        host.vgpus.filter { VgpuProfile($0.profile) == profile }
        .map { "\($0.function) has one for \($0.migrationID.isEmpty ? "no migration" : "migration \($0.migrationID)")" }
        + (profile.gpuInstance == nil ? [] : host.pciFunctions.filter { !$0.mig.instances.isEmpty })
        .map { "\($0.address) is cut into \($0.mig.instances.map(\.name).joined(separator: ", "))" }
    let message =
        room > 0
        ? "host \(host.name) has room for \(room) vGPU\(room == 1 ? "" : "s") \(profile), and more are wanted"
        : "host \(host.name) has no room for a vGPU \(profile)"
            + (there.isEmpty ? "" : " (\(there.joined(separator: ", ")))")
    return .blocked(device.id, "\(device.id): \(message)", remedy: remedy(for: profile, on: host))
}

private func remedy(for profile: VgpuProfile, on host: HostProfile) -> String {
    if profile.gpuInstance != nil, !host.pciFunctions.contains(where: \.mig.enabled),
        let gpu = host.pciFunctions.first(where: \.hasMig)
    {
        return "no GPU of it is in MIG mode: \(enableMIGHint(gpu.address)); or choose another host"
    }
    let cut = host.pciFunctions.filter(\.mig.enabled)
    if profile.gpuInstance != nil, let gpu = cut.first(where: { !$0.mig.tellsVgpus }),
        cut.allSatisfy({ $0.mig.home(of: profile) == nil })
    {
        let (found, remedy) = missingHome(of: profile, gpu.mig, gpu.address)
        return "\(found): \(remedy); or choose another host, or map it with --gpu-map"
    }
    let names = Set(host.pciFunctions.flatMap { $0.vgpuTypes.filter { $0.available > 0 }.map(\.name) }).sorted()
    return names.isEmpty
        ? "turn the GPU's virtual functions on (flotilla gpu profiles --enable ADDRESS), choose another host, "
            + "or map the profile to a device with --gpu-map"
        : "choose another host, or map it with --gpu-map to one of \(names.joined(separator: ", "))"
}
