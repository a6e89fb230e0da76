/// A vGPU profile, whatever it is spelled like: VMware's "grid_a100-40c" and "nvidia_l40s-48q", an mdev's "GRID A100-40C", the vendor path's
/// "NVIDIA A100-40C".
///
/// Source: NVIDIA's vGPU user guide, "Virtual GPU Types": <board>-<GB><series>, and <board>-<slices>-<GB><series>[ME] for
/// those on a MIG instance.
package struct VgpuProfile: Hashable, Sendable, CustomStringConvertible {
    /// "a100-40c", "a100-1-5c".
    package let key: String

    package init(_ name: String) {
        key = vgpuProfileKey(name).filter { !$0.isWhitespace }
    }

    package var description: String { key.uppercased() }

    /// Its frame buffer in MiB; "0" stands for half a GiB. Nil where the name doesn't tell.
    package var frameBufferMiB: UInt32? {
        let parts = key.split(separator: "-")
        guard parts.count >= 2, let last = parts.last else { return nil }
        let digits = last.prefix(while: \.isNumber)
        guard let series = last.dropFirst(digits.count).first, "cqba".contains(series), let size = UInt32(digits),
            size < 1 << 20
        else { return nil }
        return size == 0 ? 512 : size * 1024
    }

    /// The GPU instance it needs so far as its name tells, in nvidia-smi's words: "1g.5gb", "1g.5gb+me". Nil for one of a
    /// whole GPU. See `Mig.home` for what it is on a GPU.
    package var gpuInstance: String? {
        let parts = key.split(separator: "-")
        guard parts.count >= 3, let slices = Int(parts[parts.count - 2]), (1...7).contains(slices), let size else {
            return nil
        }
        return "\(slices)g.\(size.gigabytes)gb" + (size.rest == "me" ? "+me" : "")
    }

    /// What it is made for, by which it is licensed: c (compute), q (workstation), b (PC) or a (applications). Nil for one
    /// that isn't NVIDIA's.
    package var series: Character? { size?.series }

    private var size: (gigabytes: Substring, series: Character, rest: Substring)? {
        guard key.contains("-"), let last = key.split(separator: "-").last else { return nil }
        let gigabytes = last.prefix(while: \.isNumber)
        let rest = last.dropFirst(gigabytes.count)
        guard !gigabytes.isEmpty, let series = rest.first, "cqba".contains(series) else { return nil }
        return (gigabytes, series, rest.dropFirst())
    }
}

/// vGPU parameters (vgpu_params) of a source's `pciPassthruN.cfg.*` that mean the same on KVM, as "name=value".
/// `gpu-pci-id` names a slot of the source's host and is never among them.
///
/// Source: NVIDIA's vGPU user guide, "Setting vGPU Plugin Parameters".
package func vgpuParameters(of config: [String: String]) -> [String] {
    let same = ["enable_uvm", "enable_debugging", "enable_profiling", "frame_rate_limiter"]
    return same.compactMap { name in
        guard let value = config["cfg.\(name)"].flatMap({ UInt8($0) }), value <= 1 else { return nil }
        return "\(name)=\(value)"
    }
}
