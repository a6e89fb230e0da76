import Glibc
import HostKit
import TestKit
import Testing

/// A block device made from a file; gone when the test is over.
final class LoopDevice {
    let path: String

    /// - Parameter noise: fills the file first, so that what isn't overwritten shows.
    init(_ file: String, size: UInt64, noise: Bool = true, readOnly: Bool = false) throws {
        let backing = try File(file, O_RDWR | O_CREAT | O_TRUNC)
        try backing.truncate(to: size)
        if noise {
            var random = Seeded(state: size)
            let words = (0..<(1 << 17)).map { _ in random.next() }
            for offset in stride(from: 0, to: size, by: 1 << 20) {
                try words.withUnsafeBytes {
                    let count = Int(min(1 << 20, size - offset))
                    try backing.write(UnsafeRawBufferPointer(rebasing: $0[..<count]), at: offset)
                }
            }
        }
        let name = "\(file).name"
        try run("sh", "-c", "losetup --find --show \(readOnly ? "--read-only" : "") '\(file)' > '\(name)'")
        path = String(decoding: try Files.read(name), as: UTF8.self).filter { !$0.isNewline }
        try #require(path.hasPrefix("/dev/loop"))
    }

    deinit { try? run("losetup", "--detach", path) }

    /// Everything on it, as the next user sees it.
    func contents(_ count: Int, at offset: UInt64 = 0) throws -> [UInt8] {
        try File(path, O_RDONLY).readExactly(at: offset, count: count)
    }
}
