import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import DiskImage

@Suite struct WriterTests {
    @Test func zerosAreFound() {
        for count in [0, 1, 7, 8, 9, 63, 64, 65, 4096] {
            var bytes = [UInt8](repeating: 0, count: count)
            #expect(bytes.withUnsafeBytes { isZero($0) })
            for index in 0..<count {
                bytes[index] = 1
                #expect(!bytes.withUnsafeBytes { isZero($0) }, "\(index) of \(count)")
                bytes[index] = 0
            }
        }
    }

    @Test func clusterBitmapCoversAShortChunk() {
        var bytes = [UInt8](repeating: 0, count: 3 * Chunk.clusterSize + 512)
        bytes[0] = 1
        bytes[3 * Chunk.clusterSize + 511] = 1
        #expect(bytes.withUnsafeBytes { Chunk.clusterBitmap($0) } == 0b1001)
    }

    @Test(arguments: [0, 1, 1 << 63, .max, 0xF0F0_0000_0000_0001, 0x5555_5555_5555_5555] as [UInt64])
    func runsLaidEndToEndAreUndoneByUnpacking(_ bitmap: UInt64) {
        var bytes = [UInt8](repeating: 0, count: Chunk.size)
        for cluster in 0..<64 where bitmap >> UInt64(cluster) & 1 == 1 {
            bytes[cluster * Chunk.clusterSize] = UInt8(cluster + 1)
        }
        var moved = bytes
        moved.withUnsafeMutableBytes {
            let packed = Packing.runs(of: UnsafeRawBufferPointer($0), bitmap).flatMap { Array($0) }
            $0.copyBytes(from: packed)
            Packing.unpack($0, bitmap)
        }
        #expect(moved == bytes)
    }

    @Test func runsAreTakenFromGapsFirst() {
        var allocator = QCOW2.Allocator()
        // The newest first.
        let runs: [(UInt64, UInt64)] = [(2, 9), (20, 1), (12, 2), (1, 3), (10, 5)]
        let accepted = runs.map { allocator.adopt($0.0, $0.1) }
        #expect(accepted == [true, true, true, false, false])
        #expect(allocator.end == 21)
        // Gaps: 1, 11, 14 to 19.
        #expect(allocator.allocate(6) == 14)
        #expect(allocator.allocate(2) == 21)
        #expect(allocator.allocate(1) == 1)
        #expect(allocator.allocate(1) == 11)
        #expect(allocator.allocate(1) == 23)
        allocator.release(12, 3)
        let others = [(0, 1), (15, 2), (10, 4), (13, 1)].map { allocator.adopt($0.0, $0.1) }
        #expect(others == [false, false, false, true])
        let rest = (0..<3).map { _ in allocator.allocate(1) }
        #expect(rest == [12, 14, 24])
    }

    /// Counts that come in any order are those of counting in memory, though few blocks fit there.
    @Test func referencesAreCountedInAnyOrder() throws {
        let folder = try TemporaryFolder()
        let file = try File("\(folder.path)/counts", O_RDWR | O_CREAT)
        try file.truncate(to: 14 << 16)
        var random = Seeded(state: 5)
        var refcounts = QCOW2.Refcounts(file, start: 2)
        var expected = [UInt16](repeating: 0, count: 12 * 32768)
        for _ in 0..<200 {
            let start = UInt64.random(in: 0..<12 * 32768 - 70, using: &random)
            let range = start..<start + UInt64.random(in: 1...70, using: &random)
            try refcounts.add(range)
            for cluster in range { expected[Int(cluster)] += 1 }
        }
        try refcounts.finish()
        let bytes = try file.readExactly(at: 2 << 16, count: 12 << 16)
        let found = (0..<expected.count).map { UInt16(bytes[2 * $0]) << 8 | UInt16(bytes[2 * $0 + 1]) }
        #expect(found == expected)
    }

    @Test func refcountsCoverThemselves() {
        for dataEnd in [1, 2, 32760, 32764, 32766, 32768, 65530, 1 << 28, 1 << 34] as [UInt64] {
            let layout = QCOW2.Layout(dataEnd: dataEnd, l2Tables: dataEnd / 8192 + 1, l1Clusters: 1)
            #expect(layout.refcountBlockCount * 32768 >= layout.total)
            #expect((layout.refcountBlockCount - 1) * 32768 < layout.total)
            #expect(layout.refcountTableClusters * 8192 >= layout.refcountBlockCount)
        }
    }
}
