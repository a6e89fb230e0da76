import DiskImage
import Glibc
import HostKit
import TestKit
import Testing

@testable import Convert

/// What a conversion keeps about its chunks, driven for disks whose data nobody writes. FLOTILLA_TEST_LARGE=1 makes them
/// as large as they get: 1 TiB, and 8 TiB compressed, with a log of 512 MiB and tables of 1.2 GiB.
@Suite struct BookkeepingTests {
    private static let isLarge = getenv("FLOTILLA_TEST_LARGE") != nil
    /// AddressSanitizer holds back what is freed.
    private static let keepsFreedMemory = dlsym(nil, "__asan_init") != nil

    private func kibibytes(_ key: String) throws -> Int {
        let text = String(decoding: try Files.read("/proc/self/status"), as: UTF8.self)
        let line = try #require(text.split(separator: "\n").first { $0.hasPrefix(key + ":") })
        return try #require(Int(line.split(separator: " ").dropLast().last?.split(separator: "\t").last ?? ""))
    }

    private func placement(_ index: UInt64, _ next: inout UInt64, isCompressed: Bool) -> ChunkPlacement {
        let sizes = isCompressed ? (0..<64).map { UInt16(8000 + (index + $0) % 5) } : []
        let placement = ChunkPlacement(index: index, hostOffset: next, bitmap: .max, sizes: sizes)
        next += placement.storedBytes
        return placement
    }

    @Test(arguments: [nil, .zlib()] as [Compression?])
    func memoryFollowsNeitherCapacityNorData(_ compression: Compression?) throws {
        let folder = try TemporaryFolder()
        let capacity: UInt64 = Self.isLarge ? (compression == nil ? 1 << 40 : 8 << 40) : 16 << 30
        let total = Chunk.total(capacity: capacity)
        let before = try kibibytes("VmRSS")
        // Resets VmHWM.
        try File("/proc/self/clear_refs", O_WRONLY).write(Array("5".utf8), at: 0)

        let log = try CheckpointLog(folder.file("log"))
        try log.start(CheckpointLog.Binding(target: .qcow2, capacity: capacity, digest: Array(repeating: 1, count: 32)))
        var content = OrderedDigests(capacity: capacity)
        var next: UInt64 = 65536
        for batch in stride(from: 0, to: total, by: 64) {
            // Threads finish out of order.
            let records = (batch..<batch + 64).reversed().map {
                CheckpointLog.ChunkRecord(
                    placement: placement($0, &next, isCompressed: compression != nil),
                    digest: Array(repeating: UInt8($0 % 251), count: 32))
            }
            try log.append(records)
            for record in records {
                content.add(record.digest, chunk: record.placement.index, ticket: record.placement.index)
            }
        }
        _ = content.finalize()
        log.unlock()

        // The next run takes it all over and finishes.
        let image = folder.file("image")
        try File(image, O_RDWR | O_CREAT).truncate(to: next)
        let writer = try TargetFormat.qcow2.writer(image, capacity: capacity, compression: compression)
        let resumed = try CheckpointLog(folder.file("log"))
        #expect(try resumed.read()?.hasChunks == true)
        try resumed.adopt { try writer.adopt($0) }
        for index in 0..<total {
            let record = try #require(try resumed.record(of: index))
            guard record.placement.index == index, record.digest[0] == UInt8(index % 251) else {
                Issue.record("chunk \(index): \(record)")
                return
            }
            resumed.confirm(index)
        }
        try writer.finish(resumed.placements) { _, _ in }
        let growth = try kibibytes("VmHWM") - before
        print("\(capacity >> 30) GiB, \(compression?.description ?? "plain"): \(growth / 1024) MiB more at the peak")
        #expect(growth < 64 << 10 || Self.keepsFreedMemory)
        try run("qemu-img", "check", "-f", "qcow2", image)
    }

    @Test func aPlaceIsOneChunksOnly() throws {
        let folder = try TemporaryFolder()
        let log = try CheckpointLog(folder.file("log"))
        try log.start(CheckpointLog.Binding(target: .qcow2, capacity: 1 << 30, digest: Array(repeating: 1, count: 32)))
        // Chunk 5's place was found damaged and given to chunk 7; chunk 6 was written twice.
        for (index, cluster) in [(5, 1), (6, 2), (7, 1), (6, 3)] as [(UInt64, UInt64)] {
            let placement = ChunkPlacement(index: index, hostOffset: cluster << 16, bitmap: 1)
            try log.append([CheckpointLog.ChunkRecord(placement: placement, digest: Array(repeating: 0, count: 32))])
        }
        log.unlock()
        let image = try File(folder.file("image"), O_RDWR | O_CREAT)
        try image.truncate(to: 1 << 20)
        let writer = try TargetFormat.qcow2.writer(image.path, capacity: 1 << 30)
        let resumed = try CheckpointLog(folder.file("log"))
        _ = try resumed.read()
        try resumed.adopt { try writer.adopt($0) }
        #expect(try resumed.record(of: 5) == nil)
        #expect(try resumed.record(of: 6)?.placement.hostOffset == 3 << 16)
        #expect(try resumed.record(of: 7)?.placement.hostOffset == 1 << 16)
        // Nothing was confirmed.
        var count = 0
        try resumed.placements.forEach { _ in count += 1 }
        #expect(count == 0)
    }

    @Test func sizesWithoutTheirChunkAreCut() throws {
        let folder = try TemporaryFolder()
        let log = try CheckpointLog(folder.file("log"))
        try log.start(CheckpointLog.Binding(target: .qcow2, capacity: 1 << 30, digest: Array(repeating: 1, count: 32)))
        var next: UInt64 = 65536
        let records = (0..<2).map {
            CheckpointLog.ChunkRecord(
                placement: placement($0, &next, isCompressed: true), digest: Array(repeating: 3, count: 32))
        }
        try log.append([records[0]])
        try log.append([records[1]])
        log.unlock()
        // The second append got as far as two of its four records.
        try File(folder.file("log"), O_RDWR).truncate(to: 64 * 7)
        let resumed = try CheckpointLog(folder.file("log"))
        _ = try resumed.read()
        try resumed.cutTornTail()
        #expect(try File(folder.file("log"), O_RDONLY).size == 64 * 5)
        #expect(try resumed.record(of: 0) == records[0])
        #expect(try resumed.record(of: 1) == nil)
        try resumed.append([records[1]])
        #expect(try resumed.record(of: 1) == records[1])
    }
}
