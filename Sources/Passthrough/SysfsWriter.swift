import Glibc
import HostKit
import MigrationModel

/// A write to an attribute of the kernel's device tree.
package struct SysfsWrite: Sendable, Hashable {
    /// Below the tree's root, "bus/pci/drivers_probe".
    package var attribute: String
    package var text: String

    package init(attribute: String, text: String) { (self.attribute, self.text) = (attribute, text) }

    /// As a dry run tells it.
    package func told(of sysfs: Sysfs) -> String {
        let value = text.hasSuffix("\n") ? text.dropLast() : text[...]
        return value.isEmpty
            ? "would clear \(sysfs.path(attribute))" : "would write \(value) to \(sysfs.path(attribute))"
    }
}

/// One thing that is done to the host. What a dry run tells is what a run carries out.
package enum HostStep: Sendable, Hashable {
    case write(SysfsWrite)
    /// A program's name, and its arguments.
    case run([String])

    static func write(_ text: String, to attribute: String) -> HostStep {
        .write(SysfsWrite(attribute: attribute, text: "\(text)\n"))
    }
}

/// Writes an attribute of the kernel's device tree. Tests put a small kernel in its place, which moves driver links.
package protocol SysfsWriter: Sendable {
    /// One write(2) of the whole text.
    ///
    /// - Parameter attribute: below the tree's root, "bus/pci/drivers_probe".
    func write(_ text: String, to attribute: String) throws
}

/// The kernel itself. That a write returns without an error means little: read back what it should have done.
package struct KernelWriter: SysfsWriter {
    private let sysfs: Sysfs

    package init(_ sysfs: Sysfs = Sysfs()) { self.sysfs = sysfs }

    package func write(_ text: String, to attribute: String) throws {
        let path = sysfs.path(attribute)
        let file = try File(path, O_WRONLY)
        let bytes = Array(text.utf8)
        let count = Glibc.write(file.descriptor, bytes, bytes.count)
        guard count == bytes.count else {
            let shown = text.hasSuffix("\n") ? String(text.dropLast()) : text
            throw count < 0
                ? systemError("write \"\(shown)\" to", path)
                : MigrationError(.internal, "write \"\(shown)\" to \(path): only \(count) bytes were taken")
        }
    }
}
