import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct VMDKHostileTests {
    private func open(_ bytes: [UInt8]) throws -> MigrationError? {
        let folder = try TemporaryFolder()
        let path = try folder.write(bytes, "disk.vmdk")
        return failure { _ = try DiskFormat.vmdk.open(FileRegion(path: path)).contents() }
    }

    struct Bend: CustomTestStringConvertible, Sendable {
        let testDescription: String
        let offset: Int
        let bytes: [UInt8]
        let code: MigrationError.Code

        init(_ name: String, _ offset: Int, _ bytes: [UInt8], _ code: MigrationError.Code) {
            testDescription = name
            self.offset = offset
            self.bytes = bytes
            self.code = code
        }
    }

    @Test(arguments: [
        Bend("version 0", 4, little(0 as UInt32), .unimplemented),
        Bend("version 4", 4, little(4 as UInt32), .unimplemented),
        Bend("capacity 0", 12, little(0 as UInt64), .invalidArgument),
        Bend("capacity 2^63", 12, little(1 << 63 as UInt64), .outOfRange),
        Bend("capacity 2^54 sectors, 2^63 bytes", 12, little(1 << 54 as UInt64), .outOfRange),
        Bend("capacity all ones", 12, little(UInt64.max), .outOfRange),
        Bend("capacity beyond the directory", 12, little(1 << 41 as UInt64), .dataLoss),
        Bend("grain 0", 20, little(0 as UInt64), .invalidArgument),
        Bend("grain 12", 20, little(12 as UInt64), .invalidArgument),
        Bend("grain 2^63", 20, little(1 << 63 as UInt64), .invalidArgument),
        Bend("descriptor outside", 28, little(1 << 40 as UInt64), .dataLoss),
        Bend("descriptor at 2^63", 28, little(1 << 63 as UInt64), .dataLoss),
        Bend("descriptor of 2^60 sectors", 36, little(1 << 60 as UInt64), .invalidArgument),
        Bend("table of 0 entries", 44, little(0 as UInt32), .invalidArgument),
        Bend("table of 2^32-1 entries", 44, little(UInt32.max), .invalidArgument),
        Bend("directory at 0", 56, little(0 as UInt64), .invalidArgument),
        Bend("directory outside", 56, little(1 << 30 as UInt64), .dataLoss),
        Bend("directory at 2^63", 56, little(1 << 63 as UInt64), .dataLoss),
        Bend("directory at the end of an uncompressed disk", 56, little(UInt64.max), .invalidArgument),
        Bend("unclean shutdown", 72, [1], .failedPrecondition),
        Bend("transferred as text", 74, [0x20, 0x0A], .dataLoss),
        Bend("compression 1 without flag", 77, little(1 as UInt16), .unimplemented),
        Bend("compressed, algorithm 0", 8, little(0x30003 as UInt32), .unimplemented),
    ])
    func headerIsValidated(_ bend: Bend) throws {
        var vmdk = sampleVMDK(.sparse)
        var bytes = vmdk.bytes()
        bytes.replaceSubrange(bend.offset..<bend.offset + bend.bytes.count, with: bend.bytes)
        let error = try #require(try open(bytes))
        #expect(error.code == bend.code, "\(error)")
        #expect(error.message.contains("disk.vmdk"))
    }

    @Test func tablesAreValidated() throws {
        var vmdk = sampleVMDK(.sparse)
        let bytes = vmdk.bytes()
        // Directory at sector 3, its only table at sector 4.
        for (offset, value, code) in [
            (3 * 512, UInt32.max, MigrationError.Code.dataLoss), (4 * 512, UInt32.max, .dataLoss),
            (4 * 512, UInt32(bytes.count / 512 - 1), .dataLoss),
        ] {
            var bent = bytes
            bent.replaceSubrange(offset..<offset + 4, with: little(value))
            #expect(try open(bent)?.code == code)
        }
        vmdk.flags = 3
        #expect(try open(vmdk.bytes())?.message.contains("points into the header") == true)
    }

    @Test func damagedGrainsAreFound() throws {
        var vmdk = sampleVMDK(.stream)
        let bytes = vmdk.bytes()
        let grain = Int(try #require(vmdk.places[5])) * 512
        for (what, offset, value): (String, Int, [UInt8]) in [
            ("data", grain + 12 + 100, [bytes[grain + 112] ^ 1]), ("zlib header", grain + 12, [0]),
            ("size 0", grain + 8, little(0 as UInt32)), ("size 4 GiB", grain + 8, little(UInt32.max)),
            ("size too small", grain + 8, little(100 as UInt32)), ("LBA", grain, little(41 as UInt64)),
            ("LBA 2^63", grain, little(1 << 63 as UInt64)),
        ] {
            var bent = bytes
            bent.replaceSubrange(offset..<offset + value.count, with: value)
            #expect(try open(bent)?.code == .dataLoss, "\(what)")
        }
        vmdk.lbaError = 8
        #expect(try open(vmdk.bytes())?.message.contains("instead of 0") == true)
        vmdk = sampleVMDK(.stream)
        vmdk.grains[5] = [UInt8](repeating: 1, count: 4095)
        #expect(try open(vmdk.bytes())?.message.contains("doesn't inflate to 4096") == true)
        vmdk.grains[5] = [UInt8](repeating: 1, count: 4097)
        #expect(try open(vmdk.bytes())?.message.contains("doesn't inflate to 4096") == true)
    }

    /// A file cut anywhere is either refused as truncated or, where nothing but padding is gone, read correctly.
    @Test(arguments: SyntheticVMDK.Style.allCases)
    func truncationIsFound(_ style: SyntheticVMDK.Style) throws {
        let folder = try TemporaryFolder()
        var vmdk = sampleVMDK(style)
        let bytes = vmdk.bytes()
        let path = try folder.write(bytes, "disk.vmdk")
        let file = try File(path, O_RDWR)
        // The last grain of the sparse disk has 2048 bytes behind the end of the disk.
        let padding = [SyntheticVMDK.Style.stream: 0, .streamWithoutFooter: 511, .sparse: 2048][style] ?? 0
        var refused = 0
        for length in stride(from: bytes.count - 1, through: 4, by: -97) {
            try file.truncate(to: UInt64(length))
            do {
                #expect(try DiskFormat.vmdk.open(FileRegion(path: path)).contents() == vmdk.expected)
                #expect(bytes.count - length <= padding, "cut to \(length)")
            } catch let error as MigrationError {
                #expect(error.code == .dataLoss, "cut to \(length): \(error)")
                #expect(error.message.contains("truncated") && error.message.contains(path))
                refused += 1
            }
        }
        #expect(refused > 100)
    }

    @Test func missingBytesAreCounted() throws {
        let folder = try TemporaryFolder()
        let path = try folder.write([UInt8](repeating: 0, count: 1000), "appliance.ova")
        let error = failure { _ = try DiskFormat.raw.open(FileRegion(path: path, offset: 600, length: 512)) }
        #expect(error?.code == .dataLoss)
        #expect(error?.message.contains("112 bytes are missing") == true)
        var vmdk = sampleVMDK(.stream)
        let cut = try folder.write(vmdk.bytes().dropLast(512), "cut.vmdk")
        let footerOnly = failure { _ = try DiskFormat.vmdk.open(FileRegion(path: cut)) }
        #expect(footerOnly?.message.contains("end-of-stream marker is missing, 512 bytes are missing") == true)
    }

    @Test func foreignFormatsAreNamed() throws {
        for (magic, text): ([UInt8], String) in [
            (Array("COWD".utf8), "vmfsSparse"), (little(0xCAFE_BABE as UInt64), "seSparse"),
            ([0x51, 0x46, 0x49, 0xFB], "qcow2"), (Array("vhdxfile".utf8), "VHDX"),
        ] {
            let error = try #require(try open(magic + [UInt8](repeating: 0, count: 1024)))
            #expect(error.code == .unimplemented)
            #expect(error.message.contains(text) && error.hint != nil)
        }
        #expect(try open([])?.code == .invalidArgument)
        #expect(try open([UInt8](repeating: 0, count: 4096))?.code == .invalidArgument)
    }

    /// Twenty thousand small mutations of valid disks: errors are fine, crashes, hangs and large allocations not.
    @Test func mutationsNeverCrash() throws {
        let folder = try TemporaryFolder()
        let path = "\(folder.path)/disk.vmdk"
        let file = try File(path, O_RDWR | O_CREAT)
        let interesting: [UInt64] = [0, 1, 2, 127, 255, 512, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 63, .max]
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Chunk.size, alignment: 4096)
        defer { buffer.deallocate() }
        var random = Seeded(state: 20_000)
        var refused = 0
        for round in 0..<60 {
            let style = SyntheticVMDK.Style.allCases[round % 3]
            var vmdk = sampleVMDK(style, seed: UInt64(round))
            let bytes = vmdk.bytes()
            try file.truncate(to: 0)
            try file.write(bytes, at: 0)
            // Header, descriptor, directory, tables and markers; data bytes are of little interest.
            let weak = [0..<512, 512..<1536, 1536..<4608, bytes.count - 5120..<bytes.count]
            for _ in 0..<334 {
                var undo: [(UInt64, [UInt8])] = []
                for _ in 0...Int.random(in: 0..<3, using: &random) {
                    let area = weak[Int.random(in: 0..<weak.count, using: &random)]
                    let width = [1, 2, 4, 8][Int.random(in: 0..<4, using: &random)]
                    let offset = Int.random(in: area.lowerBound..<area.upperBound - 8, using: &random)
                    let value =
                        Bool.random(using: &random)
                        ? interesting[Int.random(in: 0..<interesting.count, using: &random)] : random.next()
                    undo.append((UInt64(offset), Array(bytes[offset..<offset + width])))
                    try file.write(Array(little(value).prefix(width)), at: UInt64(offset))
                }
                let error = failure {
                    let disk = try DiskFormat.vmdk.open(FileRegion(path: path))
                    let reader = try disk.makeReader()
                    var position: UInt64 = 0
                    for _ in 0..<8 {
                        guard let data = try reader.nextData(from: position) else { break }
                        let count = Int(min(256 << 10, disk.capacity - data))
                        _ = try reader.read(at: data, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]))
                        position = data + UInt64(count)
                    }
                }
                if error != nil { refused += 1 }
                for (offset, old) in undo.reversed() { try file.write(old, at: offset) }
            }
        }
        #expect(refused > 5_000)
    }
}
