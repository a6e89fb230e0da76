import Glibc
import HostKit
import MigrationModel

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
