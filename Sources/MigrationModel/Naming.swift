/// This program's version, as it appears in manifests and `--version`.
package let version = "0.1.0"

/// Where a converted disk gets its final name: directly in the pool's folder, named after the domain.
package func targetPath(pool: String, domain: String, disk: String, format: String) -> String {
    "\(pool)/\(domain)-\(disk).\(format)"
}

/// "512 MiB", "1.5 GiB": three significant digits and a binary unit.
package func byteText(_ bytes: UInt64) -> String {
    var (value, unit) = (Double(bytes), 0)
    while value >= 1024, unit < 6 { (value, unit) = (value / 1024, unit + 1) }
    let scale: Double = unit == 0 || value >= 100 ? 1 : value >= 10 ? 10 : 100
    let rounded = (value * scale).rounded() / scale
    let text = rounded == rounded.rounded() ? "\(UInt64(rounded))" : "\(rounded)"
    return "\(text) \(["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit])"
}
