package import FlotillaProtocol
import SwiftProtobuf

/// What a host's GPUs have left for vGPUs, and how it becomes less: as the drivers see it, and in the order in which
/// `VgpuHost.create` tries GPUs, so that what is found to fit is made so.
///
/// Source: NVIDIA's vGPU user guide. A GPU's frame buffer is shared among its vGPUs, and a virtual function holds one. Unless
/// it mixes sizes, its first vGPU decides the size of all. A MIG-backed one takes a GPU instance, or a part of one: see
/// `Mig.home`. Where nobody tells which, it is counted only where a function offers it, as one.
extension HostProfile {
    /// How many vGPUs of this profile could be made if nothing else were.
    ///
    /// - Parameter taken: functions that go to a VM as a whole.
    package func room(for profile: VgpuProfile, besides taken: Set<String> = []) -> UInt32 {
        var left = self
        var count: UInt32 = 0
        // More than any host has: a profile that lies must not keep anybody.
        while count < 4096, left.takeVgpu(profile, besides: taken) { count += 1 }
        return count
    }

    /// Takes what a vGPU of this profile needs; false when there is none.
    ///
    /// - Parameter user: whose it is, for what is said of the function.
    mutating func takeVgpu(
        _ profile: VgpuProfile, besides taken: Set<String> = [], for user: String = "somebody"
    ) -> Bool {
        let gpus = vgpuGPUs(besides: taken)
        let order = gpus.filter { !vgpus(on: $0).isEmpty } + gpus.filter { vgpus(on: $0).isEmpty }
        for way in Way.allCases {
            for gpu in order where takeVgpu(profile, on: gpu, way, user) { return true }
        }
        return false
    }

    /// How a GPU comes to have room.
    private enum Way: CaseIterable {
        case offered, newInstance, rearrangedInstances
    }

    /// A GPU with the functions that hold its vGPUs.
    private struct GPU {
        /// Index of the physical function; nil where the profile lacks it.
        var physical: Int?
        var places: [Int] = []
    }

    private func vgpuGPUs(besides taken: Set<String>) -> [GPU] {
        var gpus: [GPU] = []
        var known: [String: Int] = [:]
        for (index, function) in pciFunctions.enumerated()
        where !function.vgpuPath.isEmpty || !function.vgpuTypes.isEmpty {
            let address = function.physicalFunction.isEmpty ? function.address : function.physicalFunction
            guard !taken.contains(address), !taken.contains(function.address) else { continue }
            if let gpu = known[address] {
                gpus[gpu].places.append(index)
                continue
            }
            let physical = pciFunctions.firstIndex { $0.address == address }
            if let physical, isHandedOut(pciFunctions[physical]) { continue }
            known[address] = gpus.count
            gpus.append(GPU(physical: physical, places: [index]))
        }
        return gpus
    }

    private func isHandedOut(_ function: PciFunction) -> Bool {
        ["domain ", "what ", "VM "].contains(where: function.inUseBy.hasPrefix)
    }

    /// Profiles of those there are; nil for one that can't be told.
    private func vgpus(on gpu: GPU) -> [VgpuProfile?] {
        gpu.places.flatMap { index -> [VgpuProfile?] in
            let function = pciFunctions[index]
            let names = function.vgpuProfiles
            if names.isEmpty, function.hasVgpu_p { return [nil] }
            return names.map { $0.isEmpty ? nil : VgpuProfile($0) }
        }
    }

    private func isFree(_ place: Int) -> Bool {
        let function = pciFunctions[place]
        return !isHandedOut(function) && (function.physicalFunction.isEmpty || !function.hasVgpu_p)
    }

    private func mig(of gpu: GPU) -> Mig? {
        guard let physical = gpu.physical, pciFunctions[physical].hasMig else { return nil }
        return pciFunctions[physical].mig
    }

    private mutating func takeVgpu(_ profile: VgpuProfile, on gpu: GPU, _ way: Way, _ user: String) -> Bool {
        switch way {
        case .offered: return takeOffered(profile, on: gpu, user)
        case .newInstance, .rearrangedInstances:
            guard let physical = gpu.physical, let mig = mig(of: gpu), mig.enabled,
                let instance = mig.home(of: profile)?.name, let place = gpu.places.first(where: isFree)
            else { return false }
            if way == .newInstance {
                guard mig.hasRoom(for: instance) else { return false }
                pciFunctions[physical].mig.add(instance)
            } else {
                let function = pciFunctions[physical]
                guard vgpus(on: gpu).isEmpty, !function.inUseBy.hasPrefix("process "), !mig.instances.isEmpty,
                    let packing = mig.packing(of: mig.instances.map(\.name) + [instance])
                else { return false }
                pciFunctions[physical].mig.instances = packing
            }
            occupy(place, with: profile, user)
            return true
        }
    }

    private mutating func takeOffered(_ profile: VgpuProfile, on gpu: GPU, _ user: String) -> Bool {
        let there = vgpus(on: gpu)
        let mig = mig(of: gpu)
        let instance = profile.gpuInstance
        if let mig, mig.home(of: profile) != nil {
            // The instances are known, whatever each function offers.
            guard mig.hasPlace(for: profile, beside: there), let place = gpu.places.first(where: isFree) else {
                return false
            }
            occupy(place, with: profile, user)
            return true
        }
        guard let place = gpu.places.first(where: { isFree($0) && offers(profile, on: $0) }) else { return false }
        guard !pciFunctions[place].physicalFunction.isEmpty else {
            // The kernel counts for the whole GPU.
            count(profile, on: place, isMixed: isMixed(gpu, there))
            occupy(place, with: profile, user)
            return true
        }
        var left: UInt32?
        if instance == nil, let size = profile.frameBufferMiB {
            let total = frameBuffer(of: gpu, isEmpty: there.isEmpty)
            let used = there.reduce(0) { $0 + ($1?.frameBufferMiB ?? size) }
            left = total.map { used < $0 ? $0 - used : 0 }
            if let left, left < size { return false }
            // Once it holds one, its types tell no more.
            if let total, let physical = gpu.physical { pciFunctions[physical].framebufferMib = total }
        }
        let isMixed = isMixed(gpu, there)
        occupy(place, with: profile, user)
        for other in gpu.places {
            pciFunctions[other].vgpuTypes.removeAll { type in
                let type = VgpuProfile(type.name)
                if instance != nil { return type == profile }
                guard let size = profile.frameBufferMiB else { return false }
                // Where nobody knows the whole, one more is all that is certain.
                return left == nil || (!isMixed && type.frameBufferMiB != size)
            }
        }
        return true
    }

    private func offers(_ profile: VgpuProfile, on place: Int) -> Bool {
        pciFunctions[place].vgpuTypes.contains { VgpuProfile($0.name) == profile && $0.available > 0 }
    }

    private func isMixed(_ gpu: GPU, _ there: [VgpuProfile?]) -> Bool {
        gpu.physical.map { pciFunctions[$0].mixedSizes } ?? false || (!there.isEmpty && offeredSizes(gpu).count > 1)
    }

    private func offeredSizes(_ gpu: GPU) -> Set<UInt32> {
        let types = gpu.places.flatMap { pciFunctions[$0].vgpuTypes }.filter { $0.available > 0 }
        let profiles = types.map { VgpuProfile($0.name) }.filter { $0.gpuInstance == nil }
        return Set(profiles.compactMap(\.frameBufferMiB))
    }

    /// In MiB. Every GPU with vGPUs has a profile of its whole frame buffer, which it offers while it is empty.
    private func frameBuffer(of gpu: GPU, isEmpty: Bool) -> UInt32? {
        if let physical = gpu.physical, pciFunctions[physical].framebufferMib > 0 {
            return pciFunctions[physical].framebufferMib
        }
        return isEmpty ? offeredSizes(gpu).max() : nil
    }

    /// Of a physical function that holds vGPUs itself.
    private mutating func count(_ profile: VgpuProfile, on place: Int, isMixed: Bool) {
        for index in pciFunctions[place].vgpuTypes.indices {
            let type = pciFunctions[place].vgpuTypes[index]
            let other = VgpuProfile(type.name)
            var gone: UInt32 = other == profile ? 1 : 0
            if profile.gpuInstance == nil, let size = profile.frameBufferMiB, let theirs = other.frameBufferMiB {
                gone = theirs == size ? 1 : isMixed ? (size + theirs - 1) / theirs : type.available
            }
            pciFunctions[place].vgpuTypes[index].available -= min(gone, type.available)
        }
    }

    private mutating func occupy(_ place: Int, with profile: VgpuProfile, _ user: String) {
        pciFunctions[place].vgpuProfiles.append("\(profile)")
        if !pciFunctions[place].physicalFunction.isEmpty { pciFunctions[place].hasVgpu_p = true }
        if pciFunctions[place].inUseBy.isEmpty { pciFunctions[place].inUseBy = "a vGPU of \(user)" }
    }
}
