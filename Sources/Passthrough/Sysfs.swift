import Glibc
import HostKit

/// The kernel's device tree, or a recorded copy of one. Attributes come and go with hot-plug, so a missing one
/// reads as nil, never as an error.
package struct Sysfs: Sendable {
    /// Mount point, without a trailing slash.
    package var root: String

    package init(root: String = "/sys") { self.root = root }

    package func path(_ relative: String) -> String { "\(root)/\(relative)" }

    package func exists(_ relative: String) -> Bool { Files.exists(path(relative)) }

    /// Names in a directory, sorted; empty when there is none.
    package func list(_ relative: String) -> [String] { (try? Files.list(path(relative))) ?? [] }

    /// At most the first 4096 bytes, which is all an attribute can hold. Less for a device's configuration space: every
    /// four bytes of it are a transaction on the bus.
    package func bytes(_ relative: String, limit: Int = 4096) -> [UInt8]? {
        guard let file = try? File(path(relative), O_RDONLY) else { return nil }
        return try? [UInt8](unsafeUninitializedCapacity: limit) { buffer, count in
            count = try file.read(at: 0, into: UnsafeMutableRawBufferPointer(buffer))
        }
    }

    /// An attribute's text without the trailing newline. A recorded tree may hold anything: no control character of it
    /// reaches a terminal.
    package func text(_ relative: String) -> String? {
        bytes(relative).map { bytes in
            String(decoding: bytes.prefix { $0 != 0x0a }.map { $0 < 0x20 || $0 == 0x7f ? 0x3f : $0 }, as: UTF8.self)
        }
    }

    /// A number written as `0x10de` or decimal `-1`.
    package func number(_ relative: String) -> Int64? {
        guard let text = text(relative) else { return nil }
        return text.hasPrefix("0x") ? Int64(text.dropFirst(2), radix: 16) : Int64(text)
    }

    /// What a symbolic link points at, usually relative to its own folder.
    package func linkPath(_ relative: String) -> String? { linkTarget(path(relative)) }

    /// The last component of what a symbolic link points at: a device's `driver` gives the driver's name.
    package func linkName(_ relative: String) -> String? {
        linkTarget(path(relative)).map(Files.name(of:))
    }
}

/// What a symbolic link says, nil when there is none. Cut at 4095 bytes.
func linkTarget(_ path: String) -> String? {
    let bytes = [UInt8](unsafeUninitializedCapacity: 4096) { buffer, count in
        count = buffer.withMemoryRebound(to: CChar.self) { text in
            text.baseAddress.map { max(0, readlink(path, $0, 4095)) } ?? 0
        }
    }
    return bytes.isEmpty ? nil : String(decoding: bytes, as: UTF8.self)
}
