/// Something of the host that only one domain can have: a PCI function (virtual functions included) or a mediated device.
package struct GPUResource: Hashable, Comparable, Sendable, Codable, CustomStringConvertible {
    /// "pci:0000:3b:00.0" or "mdev:<UUID>", lower case.
    package let key: String
    /// Keys of what this is a part of: a virtual function's physical one, the function a mediated device lives on. Who
    /// has the whole excludes who wants a part, and the reverse.
    package let parents: [String]

    package init(function: PciAddress, partOf physical: PciAddress? = nil) {
        key = "pci:\(function)"
        parents = physical.map { ["pci:\($0)"] } ?? []
    }

    /// - Parameter parents: the function it lives on, and that one's physical function where it is a virtual one.
    package init(mdev uuid: String, partOf parents: [PciAddress]) {
        key = "mdev:\(uuid.lowercased())"
        self.parents = parents.map { "pci:\($0)" }
    }

    /// A function of this host; knows its physical function from sysfs.
    package init(function: PciAddress, sysfs: Sysfs) {
        self.init(
            function: function, partOf: sysfs.linkName("bus/pci/devices/\(function)/physfn").flatMap(PciAddress.init))
    }

    /// Nil for a mediated device.
    package var function: PciAddress? { key.hasPrefix("pci:") ? PciAddress(String(key.dropFirst(4))) : nil }

    package var mdev: String? { key.hasPrefix("mdev:") ? String(key.dropFirst(5)) : nil }

    package var description: String { function.map(\.description) ?? "mediated device \(key.dropFirst(5))" }

    /// Both can't be handed out at once.
    func overlaps(_ other: GPUResource) -> Bool {
        key == other.key || parents.contains(other.key) || other.parents.contains(key)
    }

    func isPart(of other: GPUResource) -> Bool { parents.contains(other.key) }

    package static func < (a: Self, b: Self) -> Bool { a.key < b.key }
}

/// Who asks for a resource.
package struct GPUOwner: Hashable, Sendable, Codable, CustomStringConvertible {
    /// The libvirt domain's name.
    package var domain: String
    /// Empty for a domain that no migration made.
    package var migration: String
    /// Of the attempt. Within one migration the larger fence wins.
    package var fence: UInt64
    /// URI of the libvirt that has or gets the domain; nil where earlier versions wrote it, and of what was made by hand.
    package var libvirt: String?

    package init(domain: String, migration: String, fence: UInt64, libvirt: String? = nil) {
        self.domain = domain
        self.migration = migration
        self.fence = fence
        self.libvirt = libvirt
    }

    package var description: String {
        "domain \(domain)" + (migration.isEmpty ? "" : " (migration \(migration))")
    }

    /// Attempts of one migration are one owner, whatever the domain is called in each.
    func isSame(as other: GPUOwner) -> Bool {
        migration.isEmpty && other.migration.isEmpty ? domain == other.domain : migration == other.migration
    }
}

/// A line of the ledger.
package struct GPUReservation: Sendable, Codable {
    package enum State: String, Sendable, Codable {
        case reserved
        /// Given back, and what the last owner left in its memory is still there.
        case dirty
    }

    package var resource: GPUResource
    /// Of a dirty resource, the last one.
    package var owner: GPUOwner
    package var state: State
    /// Milliseconds since 1970 of the last change.
    package var since: Int64
    /// The kernel's id of the boot in which it became dirty: a reboot resets every device, a kexec none.
    var boot: String?
    /// Of a reserved one: the process that took it, see `Keeper`.
    var keeper: String?
    /// No domain had it since it was taken.
    package var isUntouched: Bool?
}
