import DiskImage
import Glibc
import HostKit
import TestKit
import Testing

@testable import Convert

@Suite struct ContentDigestTests {
    private func pair(_ first: [UInt8], _ second: [UInt8], usesInstructions: Bool) -> [[UInt8]] {
        var one = [UInt8](repeating: 0, count: 32)
        var other = one
        first.withUnsafeBytes { first in
            second.withUnsafeBytes { second in
                one.withUnsafeMutableBytes { one in
                    other.withUnsafeMutableBytes { other in
                        Digest.sha256(first, second, into: (one, other), usesInstructions: usesInstructions)
                    }
                }
            }
        }
        return [one, other]
    }

    @Test(arguments: [true, false])
    func pairsAreWhatOpenSSLSays(_ usesInstructions: Bool) {
        var random = Seeded(state: 7)
        for count in [0, 64, 128, 192, 4096, 65536] {
            let messages = (0..<2).map { _ in (0..<count).map { _ in UInt8.random(in: 0...255, using: &random) } }
            let found = pair(messages[0], messages[1], usesInstructions: usesInstructions)
            #expect(found == messages.map { Digest.hash(.sha256, $0) }, "\(count) bytes")
        }
        // FIPS 180-2, appendix B.3.
        let million = [UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000)
        let known = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
        #expect(pair(million, million, usesInstructions: usesInstructions).map { hex($0) } == [known, known])
    }

    /// Any mix of blocks of zeros and of data, a short last block, and chunks of both kinds beside it.
    @Test(
        arguments: [0, 1, 0b10, 0b101, 0b111, 1 << 63, .max, 0x5555_5555_5555_5555] as [UInt64], [0, 512, 65536, 70144])
    func isWhatTheDocumentationSays(_ blocks: UInt64, _ tail: Int) throws {
        let folder = try TemporaryFolder()
        let file = try File(folder.file("disk.raw"), O_RDWR | O_CREAT)
        let capacity = UInt64(2 * Chunk.size + tail)
        try file.truncate(to: capacity)
        for block in 0..<64 where blocks >> UInt64(block) & 1 == 1 {
            try file.write([UInt8](repeating: UInt8(block + 1), count: 700), at: UInt64(block << 16 + block * 1000))
        }
        if blocks & 2 != 0, tail > 0 { try file.write([9], at: capacity - 1) }
        let disk = try DiskFormat.raw.open(FileRegion(path: file.path))
        #expect(try ContentDigest.compute(disk) == documentedDigest(file.path))
    }
}
