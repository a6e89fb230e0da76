import HostKit
import MigrationModel

extension VMDK {
    /// The file a descriptor names, which must lie in the descriptor's own directory. Descriptors come from elsewhere: one
    /// that names `/etc/shadow` must not turn it into a disk of a guest.
    ///
    /// - Parameter isResolved: whether the descriptor's path has no links, so that its directory is that and no other.
    static func resolve(_ name: String, beside descriptor: String, isResolved: Bool) throws -> FileRegion {
        func refused(_ why: String) -> MigrationError {
            MigrationError(
                .invalidArgument, "\(descriptor): extent name \"\(printable(name))\" \(why)",
                hint: "put all extents beside the descriptor and name them without a path")
        }
        guard !name.isEmpty, name != ".", name != ".." else { throw refused("is not a file name") }
        guard !name.utf8.contains(UInt8(ascii: "/")) else { throw refused("contains a path") }
        guard name.utf8.allSatisfy({ $0 >= 0x20 && $0 != 0x7F }) else { throw refused("has control characters") }
        let parent = Files.parent(of: descriptor)
        let directory = try isResolved ? parent : Files.canonical(parent)
        let path = directory == "/" ? "/\(name)" : "\(directory)/\(name)"
        guard Files.exists(path) else {
            throw MigrationError(
                .notFound, "\(descriptor): its extent \(printable(name)) is missing",
                hint: "copy all files of the disk into one directory")
        }
        let resolved = try Files.canonical(path)
        guard Files.parent(of: resolved) == directory else {
            throw refused("is a symbolic link that leads out of the descriptor's directory")
        }
        return FileRegion(path: resolved, isResolved: true)
    }

    /// Text from a descriptor as it may appear in a message: short and without control characters.
    static func printable(_ text: some StringProtocol) -> String {
        String(String.UnicodeScalarView(text.unicodeScalars.prefix(80).map { $0.value < 0x20 ? "?" : $0 }))
    }
}
