import Glibc
import HostKit
import MigrationModel
import Passthrough
import Synchronization

/// Does to a copied device tree what the kernel does on a write: moves driver links. Knows which driver takes which
/// device by who had it when the kernel "booted".
final class FixtureKernel: SysfsWriter {
    struct Writes {
        var log: [String] = []
        /// Fail the write of this number, from 1.
        var failing: Set<Int> = []
        /// What vfio-pci takes by its boot options: "1234 1111", a vendor and a device in hexadecimal.
        var ids: Set<String> = []
    }

    let sysfs: Sysfs
    /// Drivers by address, at boot.
    private let matching: [String: String]
    /// vfio-pci says no to these, without an error.
    let refused: Set<String>
    /// Drivers that fail to take their device back.
    let broken: Set<String>
    let writes: Mutex<Writes>

    /// - Parameter knowing: what `drivers` said at boot, for a kernel that is made when drivers have moved already.
    init(
        _ sysfs: Sysfs, failing: Set<Int> = [], refused: Set<String> = [], broken: Set<String> = [],
        knowing boot: [String]? = nil
    ) {
        self.sysfs = sysfs
        self.refused = refused
        self.broken = broken
        writes = Mutex(Writes(failing: failing))
        var matching: [String: String] = [:]
        for line in boot ?? drivers(sysfs) {
            let words = line.split(separator: " ").map(String.init)
            if words[1] != "-" { matching[words[0]] = words[1] }
        }
        self.matching = matching
    }

    var log: [String] { writes.withLock { $0.log } }

    func write(_ text: String, to attribute: String) throws {
        let number = writes.withLock { state in
            state.log.append("\(attribute) \(text.dropLast(text.hasSuffix("\n") ? 1 : 0))")
            return state.log.count
        }
        if writes.withLock({ $0.failing.contains(number) }) {
            throw MigrationError(.internal, "write \(number) failed")
        }
        guard Files.exists(sysfs.path(attribute)) || attribute == "bus/pci/drivers_probe" || attribute.hasSuffix("bind")
        else { throw MigrationError(.notFound, "\(attribute) is not there") }
        let value = text.hasSuffix("\n") ? String(text.dropLast()) : text
        if attribute.hasSuffix("/driver_override") {
            // The kernel: an empty line clears it, and "(null)" is how that reads.
            try set(attribute, value.isEmpty ? "(null)" : value)
        } else if attribute.hasSuffix("/driver/unbind") {
            try unbind(value)
        } else if attribute == "bus/pci/drivers_probe" {
            if driver(value).isEmpty { try probe(value) }
        } else if attribute.hasSuffix("/bind") {
            try bind(value, Files.name(of: Files.parent(of: attribute)))
        } else if attribute.hasSuffix("/vfio-pci/remove_id") {
            guard writes.withLock({ $0.ids.remove(value) }) != nil else {
                throw MigrationError(.notFound, "\(value) is not in the list")
            }
        } else {
            try set(attribute, value)
        }
    }

    private func probe(_ address: String) throws {
        let override = sysfs.text("bus/pci/devices/\(address)/driver_override") ?? "(null)"
        if override == "(null)" {
            let ids = ["vendor", "device"].map { sysfs.number("bus/pci/devices/\(address)/\($0)") ?? 0 }
            let id = ids.map { String($0, radix: 16) }.joined(separator: " ")
            if writes.withLock({ $0.ids.contains(id) }) { return try bind(address, "vfio-pci") }
            if let driver = matching[address] { try bind(address, driver) }
        } else {
            try bind(address, override)
        }
    }

    private func bind(_ address: String, _ driver: String) throws {
        if broken.contains(driver) || (driver == "vfio-pci" && refused.contains(address)) { return }
        guard Files.exists(sysfs.path("bus/pci/drivers/\(driver)")), self.driver(address).isEmpty else { return }
        // No IOMMU group: vfio-pci refuses, and the write says nothing.
        if driver == "vfio-pci", !Files.exists(sysfs.path("bus/pci/devices/\(address)/iommu_group")) { return }
        guard symlink("../../drivers/\(driver)", sysfs.path("bus/pci/devices/\(address)/driver")) == 0 else {
            throw systemError("bind", address)
        }
    }

    private func unbind(_ address: String) throws {
        try Files.remove(sysfs.path("bus/pci/devices/\(address)/driver"))
    }

    private func driver(_ address: String) -> String { sysfs.linkName("bus/pci/devices/\(address)/driver") ?? "" }

    private func set(_ attribute: String, _ value: String) throws {
        let file = try File(sysfs.path(attribute), O_WRONLY | O_TRUNC)
        try file.write(Array("\(value)\n".utf8), at: 0)
    }
}

/// Driver and override of every function, to compare before and after.
func drivers(_ sysfs: Sysfs) -> [String] {
    sysfs.list("bus/pci/devices").map { address in
        let folder = "bus/pci/devices/\(address)"
        return
            "\(address) \(sysfs.linkName("\(folder)/driver") ?? "-") \(sysfs.text("\(folder)/driver_override") ?? "")"
    }
}
