import Glibc
import MigrationModel

/// Where a VM comes from, as a person writes it: `ova:PATH`, `ovf:PATH`, `vmx:PATH` or `manifest:PATH`.
package struct SourceURL: Sendable, Hashable, CustomStringConvertible {
    package enum Kind: String, Sendable, CaseIterable {
        case ova, ovf, vmx, manifest
    }

    package let kind: Kind
    /// Absolute path of the OVA, OVF, VMX or manifest file.
    package let path: String
    /// The text it was parsed from.
    package let description: String

    /// A relative path is taken from the current directory.
    ///
    /// - Throws: `invalidArgument` for anything that is no source, `unimplemented` for the schemes that later versions
    ///   will know.
    package init(parsing text: String) throws {
        let shown = text.withoutPassword.printable
        if text.hasPrefix("vsphere:") {
            throw MigrationError(
                .invalidArgument, "source \(shown) is a vSphere server where a file is wanted",
                hint: "give ova:PATH, ovf:PATH, vmx:PATH or manifest:PATH")
        }
        let forms = "give ova:PATH, ovf:PATH, vmx:PATH, manifest:PATH or vsphere://USER@HOST[/DATACENTER]"
        guard let colon = text.firstIndex(of: ":"), let kind = Kind(rawValue: String(text[..<colon])) else {
            throw MigrationError(.invalidArgument, "source '\(shown)' is not one this program reads", hint: forms)
        }
        let path = String(text[text.index(after: colon)...])
        guard !path.isEmpty, !path.utf8.contains(0) else {
            throw MigrationError(.invalidArgument, "source '\(shown)' has no usable path", hint: forms)
        }
        guard !path.hasPrefix("//") else {
            throw MigrationError(
                .invalidArgument, "source '\(shown)': the path follows the colon without slashes of its own",
                hint: "for a local file \(forms)")
        }
        self.kind = kind
        self.path = try Self.absolute(path)
        description = text
    }

    /// Absolute, without `.` components. `..` stays for the kernel to resolve: what stands before it may be a link.
    private static func absolute(_ path: String) throws -> String {
        var full = path
        if !path.hasPrefix("/") {
            guard let current = getcwd(nil, 0) else {
                throw MigrationError(.notFound, "source \(path): the current directory is gone")
            }
            defer { free(current) }
            full = String(cString: current) + "/" + path
        }
        let parts = full.split(separator: "/").filter { $0 != "." }
        guard !parts.isEmpty else {
            throw MigrationError(
                .invalidArgument, "source '\(path)' is a directory, not a file",
                hint: "give ova:PATH, ovf:PATH, vmx:PATH, manifest:PATH or vsphere://USER@HOST[/DATACENTER]")
        }
        return "/" + parts.joined(separator: "/")
    }
}
