import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

extension TemporaryFolder {
    func write(_ bytes: [UInt8], _ name: String) throws -> String {
        let file = try File("\(path)/\(name)", O_RDWR | O_CREAT | O_TRUNC)
        try file.write(bytes, at: 0)
        return file.path
    }
}

extension DiskSource {
    /// The whole disk as the guest sees it; meant for small ones.
    func contents() throws -> [UInt8] {
        let reader = try makeReader()
        var bytes = [UInt8](repeating: 0xEE, count: Int(capacity))
        try bytes.withUnsafeMutableBytes { buffer in
            var offset = 0
            while offset < buffer.count {
                let count = min(Chunk.size, buffer.count - offset)
                let part = UnsafeMutableRawBufferPointer(rebasing: buffer[offset..<offset + count])
                if try reader.read(at: UInt64(offset), into: part) == .zero {
                    for index in part.indices { part[index] = 0 }
                }
                offset += count
            }
        }
        return bytes
    }
}

/// Repeatable pseudo-random numbers (SplitMix64).
struct Seeded: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
        return z ^ z >> 31
    }

    mutating func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8(truncatingIfNeeded: next()) } }
}
