import FlotillaProtocol

/// A vGPU profile's name without what differs between VMware, the mdev and the vendor's path: "grid_a100-40c",
/// "GRID A100-40C" and "NVIDIA A100-40C" are one, "nvidia_rtx_pro_6000_blackwell_dc-1-24q" and
/// "NVIDIA RTX Pro 6000 Blackwell DC-1-24Q" another.
package func vgpuProfileKey(_ name: String) -> String {
    var key = name.lowercased()
    for prefix in ["grid_", "nvidia_"] where key.hasPrefix(prefix) {
        key = String(key.dropFirst(prefix.count).map { $0 == "_" ? " " : $0 })
    }
    for prefix in ["grid ", "nvidia "] where key.hasPrefix(prefix) { key.removeFirst(prefix.count) }
    return key
}

/// What a vGPU of this profile needs on this physical or virtual function.
func checkVgpu(_ profile: String, on device: DeviceFunction, in tree: DeviceTree, _ mig: Mig?) -> [Requirement] {
    let subject = device.function.address
    var found: [Requirement] = []
    if isVfio(driver: device.function.driver) {
        return [
            .fail(
                subject, "driver", "\(device.function.text) is bound to hand over as a whole",
                remedy: "flotilla gpu release \(subject), so that the vendor's driver has it")
        ]
    }
    if device.function.driver.isEmpty {
        return [
            .fail(
                subject, "driver", "\(device.function.text) has no driver, and vGPUs are made by the vendor's",
                remedy: "install and load the vendor's vGPU host driver")
        ]
    }
    found.append(.pass(subject, "driver", device.function.driver))
    // Its own virtual functions and other vGPUs beside the new one are as it should be.
    var whole = device
    whole.uses.removeAll { $0.isOfPart || ![.domain, .reservation, .vfio].contains($0.kind) }
    found += useObstacles(of: whole, consent: [.console, .use], owner: nil)
    let places = [device] + device.virtualFunctions.compactMap { tree[$0] }
    let offering = places.filter { $0.vgpuPath != nil }
    guard !offering.isEmpty else {
        if device.totalVirtualFunctions > 0, device.virtualFunctions.isEmpty {
            return found + [
                .fail(
                    subject, "virtual functions",
                    "none of its \(device.totalVirtualFunctions) virtual functions is enabled",
                    remedy: "flotilla gpu profiles --enable \(subject)")
            ]
        }
        return found + [
            .fail(
                subject, "vGPU", "\(device.function.driver) offers no vGPUs on \(subject)",
                remedy: "install the vendor's vGPU host driver; not every GPU has vGPUs")
        ]
    }
    if !device.virtualFunctions.isEmpty {
        found.append(.pass(subject, "virtual functions", "\(device.virtualFunctions.count) enabled"))
    }
    let physical = (device.physicalFunction ?? device.address).description
    let wanted = VgpuProfile(profile)
    let home = mig.flatMap { $0.enabled ? $0.home(of: wanted) : nil }
    let alike = offering.flatMap { place in
        place.vgpuOffers.filter { VgpuProfile($0.name) == wanted }.map { (place, $0) }
    }
    let free = alike.filter { place, offer in (offer.available ?? 1) > 0 && !isTaken(place) }
    if let (place, offer) = free.first {
        let count = offer.available.map { ", \($0) more" } ?? ""
        found.append(
            .pass(
                subject, "profile", "\(offer.name) can be made on \(place.function.address) (type \(offer.id)\(count))")
        )
        if tree.iommu, place.function.iommuGroup < 0, place.vgpuPath == "vendor-vfio" {
            found.append(
                .fail(
                    place.function.address, "IOMMU group", "\(place.function.text) is in no IOMMU group",
                    remedy: "enable SR-IOV and the IOMMU in the firmware"))
        }
    } else if device.physicalFunction != nil, isTaken(device) {
        let users = device.uses.map(\.by).joined(separator: ", ")
        // What has it without a vGPU was named above.
        if device.uses.contains(where: { $0.kind == .vgpu }) || !found.contains(where: { $0.requirement == "free" }) {
            found.append(
                .fail(
                    subject, "profile", "\(subject) can have one vGPU, and is in use by \(users)",
                    remedy: "destroy that vGPU, or choose another virtual function of \(physical)"))
        }
    } else if let mig, wanted.gpuInstance != nil, !mig.enabled {
        found.append(
            .fail(physical, "MIG mode", "\(physical) is not in MIG mode", remedy: enableMIGHint(physical)))
    } else if let mig, let home, mig.hasRoom(for: home.name) {
        found.append(checkInstance(home.name, on: physical, places: offering))
    } else if let home, alike.isEmpty {
        found.append(
            .fail(
                physical, "profile", "\(physical) has no room for a GPU instance \(home.name)",
                remedy: "destroy a vGPU on it, or choose another GPU"))
    } else if let mig, wanted.gpuInstance != nil, home == nil {
        let (text, remedy) = missingHome(of: wanted, mig, physical)
        found.append(.fail(physical, "profile", text, remedy: remedy))
    } else if !alike.isEmpty || offering.allSatisfy(isTaken) {
        found.append(
            .fail(
                subject, "profile", "\(subject) has no room for another \(profile)",
                remedy: "destroy a vGPU on it, or choose another GPU"))
    } else {
        let names = Set(offering.flatMap { $0.vgpuOffers.map(\.name) }).sorted()
        found.append(
            .fail(
                subject, "profile",
                "\(subject) can't make \(profile) now; it offers \(names.isEmpty ? "nothing" : names.joined(separator: ", "))",
                remedy: isMIGProfile(wanted.key)
                    ? "choose an offered profile; this one needs room for a GPU instance in MIG mode: \(enableMIGHint(physical))"
                    : "choose an offered profile; while another size is in use a GPU offers only that one"))
    }
    return found
}

/// It takes no vGPU. What a physical function has on the kernel's path, its types count.
private func isTaken(_ place: DeviceFunction) -> Bool {
    let isCounted = place.vgpuPath == "mdev" && place.physicalFunction == nil
    return !isCounted && place.uses.contains { [.vgpu, .domain, .reservation, .vfio].contains($0.kind) }
}

/// One is made with the vGPU where there is none yet.
private func checkInstance(_ instance: String, on gpu: String, places: [DeviceFunction]) -> Requirement {
    guard !places.allSatisfy(isTaken) else {
        return .fail(
            gpu, "virtual functions", "each virtual function of \(gpu) is in use",
            remedy: "destroy a vGPU on it, or choose another GPU")
    }
    return .pass(gpu, "profile", "room for a GPU instance \(instance), which is made with the vGPU")
}

/// "a100-1-5c" is backed by a MIG instance of one slice, "a100-5c" is time-sliced.
func isMIGProfile(_ key: String) -> Bool {
    let parts = key.split(separator: "-")
    return parts.count >= 3 && parts[parts.count - 2].allSatisfy(\.isNumber)
}
