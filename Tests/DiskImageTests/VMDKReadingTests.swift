import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// A disk of 37.5 grains of 4 KiB with data, holes, a zeroed grain and a short last grain.
func sampleVMDK(_ style: SyntheticVMDK.Style, seed: UInt64 = 1) -> SyntheticVMDK {
    var random = Seeded(state: seed)
    var vmdk = SyntheticVMDK(style: style, capacity: 300)
    if style == .sparse { vmdk.createType = "monolithicSparse" }
    for grain: UInt64 in [0, 1, 2, 5, 6, 20] { vmdk.grains[grain] = random.bytes(4096) }
    vmdk.grains[37] = random.bytes(style == .sparse ? 4096 : 2048)
    vmdk.zeroed = [10]
    return vmdk
}

@Suite struct VMDKReadingTests {
    @Test(arguments: SyntheticVMDK.Style.allCases)
    func readsWhatWasWritten(_ style: SyntheticVMDK.Style) throws {
        let folder = try TemporaryFolder()
        var vmdk = sampleVMDK(style)
        let disk = try DiskFormat.vmdk.open(FileRegion(path: try folder.write(vmdk.bytes(), "disk.vmdk")))
        #expect(disk.capacity == 300 * 512)
        #expect(disk.formatName == (style == .sparse ? "VMDK monolithicSparse" : "VMDK streamOptimized"))
        #expect(try disk.contents() == vmdk.expected)
        // Unaligned parts, as a chunk that spans two extents asks for them.
        let reader = try disk.makeReader()
        for (offset, count) in [(512, 1024), (3584, 1024), (8192 - 512, 20480), (150_016, 3584)] {
            var part = [UInt8](repeating: 0xEE, count: count)
            let content = try part.withUnsafeMutableBytes { try reader.read(at: UInt64(offset), into: $0) }
            #expect(content == .data)
            #expect(part == Array(vmdk.expected[offset..<offset + count]), "at \(offset)")
        }
    }

    @Test(arguments: SyntheticVMDK.Style.allCases)
    func knowsHolesWithoutReading(_ style: SyntheticVMDK.Style) throws {
        let folder = try TemporaryFolder()
        var vmdk = sampleVMDK(style)
        let disk = try DiskFormat.vmdk.open(FileRegion(path: try folder.write(vmdk.bytes(), "disk.vmdk")))
        let reader = try disk.makeReader()
        #expect(try reader.nextData(from: 0) == 0)
        #expect(try reader.nextData(from: 700) == 700)
        #expect(try reader.nextData(from: 3 * 4096) == 5 * 4096)
        #expect(try reader.nextData(from: 7 * 4096) == 20 * 4096)
        #expect(try reader.nextData(from: 21 * 4096) == 37 * 4096)
        #expect(try reader.nextData(from: 300 * 512) == nil)
        var hole = [UInt8](repeating: 0, count: 4096)
        #expect(try hole.withUnsafeMutableBytes { try reader.read(at: 10 * 4096, into: $0) } == .zero)
    }

    @Test func readsAMemberOfAnArchiveInPlace() throws {
        let folder = try TemporaryFolder()
        var vmdk = sampleVMDK(.stream)
        let bytes = vmdk.bytes()
        var random = Seeded(state: 3)
        let path = try folder.write(random.bytes(1536) + bytes + random.bytes(5000), "appliance.ova")
        let region = FileRegion(path: path, offset: 1536, length: UInt64(bytes.count))
        #expect(try DiskFormat.detect(region) == .vmdk)
        #expect(try DiskFormat.vmdk.open(region).contents() == vmdk.expected)
    }

    @Test func toleratesPaddingBehindTheStream() throws {
        let folder = try TemporaryFolder()
        var vmdk = sampleVMDK(.stream)
        let path = try folder.write(vmdk.bytes() + [UInt8](repeating: 0, count: 10 * 512), "disk.vmdk")
        #expect(try DiskFormat.vmdk.open(FileRegion(path: path)).contents() == vmdk.expected)
    }

    @Test func flatDisksOfAnyLength() throws {
        let folder = try TemporaryFolder()
        var random = Seeded(state: 9)
        for length in [1, 511, 512, 513, 70000] {
            let bytes = random.bytes(length)
            let disk = try DiskFormat.raw.open(FileRegion(path: try folder.write(bytes, "disk.raw")))
            #expect(disk.capacity == UInt64((length + 511) / 512 * 512))
            #expect(try disk.contents() == bytes + [UInt8](repeating: 0, count: Int(disk.capacity) - length))
        }
    }

    @Test func flatHolesAreKnown() throws {
        let folder = try TemporaryFolder()
        let path = try folder.write([], "sparse.raw")
        let file = try File(path, O_RDWR)
        try file.truncate(to: 8 << 30)
        try file.write([UInt8](repeating: 7, count: 4096), at: 5 << 30)
        let reader = try DiskFormat.raw.open(FileRegion(path: path)).makeReader()
        #expect(try reader.nextData(from: 0) == 5 << 30)
        #expect(try reader.nextData(from: 5 << 30 | 4096) == nil)
    }

    @Test func mixedExtentsOfOddSizes() throws {
        let folder = try TemporaryFolder()
        var random = Seeded(state: 4)
        let flat = random.bytes(7 * 512)
        _ = try folder.write(random.bytes(512) + flat, "a-flat.vmdk")
        var sparse = sampleVMDK(.sparse)
        _ = try folder.write(sparse.bytes(), "a-s001.vmdk")
        let text = """
            # Disk DescriptorFile
            version=1
            parentCID=ffffffff
            createType="twoGbMaxExtentSparse"
            RW 7 FLAT "a-flat.vmdk" 1
            RW 3 ZERO
            RW 299 SPARSE "a-s001.vmdk"
            RW 7 FLAT "a-flat.vmdk" 1
            """
        let path = try folder.write(Array(text.utf8), "a.vmdk")
        let disk = try DiskFormat.vmdk.open(FileRegion(path: path))
        #expect(disk.capacity == (7 + 3 + 299 + 7) * 512)
        #expect(disk.files.map { Files.name(of: $0.path) } == ["a.vmdk", "a-flat.vmdk", "a-s001.vmdk", "a-flat.vmdk"])
        let zeros = [UInt8](repeating: 0, count: 3 * 512)
        #expect(try disk.contents() == flat + zeros + sparse.expected[..<(299 * 512)] + flat)
    }
}
