import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// qcow2 images with clusters of every size that QEMU has.
@Suite struct ClusterSizeTests {
    private static let sizes = [9, 10, 12, 14, 15, 17, 19, 21].map { 1 << $0 } as [UInt64]

    private func options(_ size: UInt64) throws -> DiskConversion.Options {
        var options = DiskConversion.Options()
        options.geometry = try QCOW2.Geometry(clusterSize: size)
        options.checkpointBytes = 1
        options.threads = 2
        return options
    }

    private func judge(_ scene: Scene, _ result: DiskConversion.Result, _ size: UInt64) throws {
        try scene.judge(result)
        let header = try File(result.path, O_RDONLY).readExactly(at: 20, count: 4)
        #expect(header == [0, 0, 0, UInt8(size.trailingZeroBitCount)])
    }

    @Test(arguments: sizes) func imagesAreWhatQEMUExpects(_ size: UInt64) throws {
        let scene = try Scene(options: options(size))
        try judge(scene, try scene.conversion.run(), size)
    }

    @Test(arguments: [512, 4096, 2 << 20] as [UInt64], [512, 4096 + 512, 2 << 20, 5 << 20 | 1536] as [UInt64])
    func disksMayEndAnywhere(_ size: UInt64, _ capacity: UInt64) throws {
        let folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: capacity, seed: capacity)
        let result = try DiskConversion(
            source: FileRegion(path: folder.file("made.raw")), sourceFormat: .raw, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk.qcow2"),
            options: options(size)
        ).run()
        #expect(result.capacity == capacity)
        try run("qemu-img", "check", "-f", "qcow2", result.path)
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder.file("made.raw"), result.path)
    }

    @Test(arguments: [512, 4096, 128 << 10, 2 << 20] as [UInt64]) func interruptedOnesAreContinued(_ size: UInt64)
        throws
    {
        let scene = try Scene(options: options(size))
        let stop = StopFlag()
        _ = failure { _ = try scene.conversion.run(stop: stop) { if $0.writtenBytes > 0 { stop.set() } } }
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        #expect(stop.isSet ? last.map { $0.resumedBytes > 0 } == true : result.notice == .alreadyPublished)
        try judge(scene, result, size)
    }

    /// 5 TiB with a piece at every power of two: long L1 tables, many of their entries empty.
    @Test(arguments: [4096, 64 << 10, 2 << 20] as [UInt64]) func largeSparseDisksFit(_ size: UInt64) throws {
        let folder = try TemporaryFolder("work")
        let file = try File(folder.file("made.raw"), O_RDWR | O_CREAT)
        try file.truncate(to: 5 << 40)
        for shift in 12...42 { try file.write([UInt8(shift)], at: 1 << UInt64(shift)) }
        let result = try DiskConversion(
            source: FileRegion(path: file.path), sourceFormat: .raw, targetFormat: .qcow2,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk.qcow2"),
            options: options(size)
        ).run()
        try run("qemu-img", "check", "-f", "qcow2", result.path)
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", file.path, result.path)
    }

    @Test func whatQEMUWouldNotOpenIsRefused() throws {
        for size: UInt64 in [0, 256, 3 << 10, 65 << 10, 4 << 20] {
            #expect(failure { _ = try QCOW2.Geometry(clusterSize: size) }?.code == .invalidArgument)
        }
        let folder = try TemporaryFolder()
        for (size, capacity): (UInt64, UInt64) in [(512, 200 << 30), (4096, 9 << 40)] {
            let error = failure {
                _ = try TargetFormat.qcow2.writer(
                    folder.file("disk"), capacity: capacity, geometry: QCOW2.Geometry(clusterSize: size))
            }
            #expect(error?.code == .invalidArgument && error?.hint != nil)
            #expect(!Files.exists(folder.file("disk")))
        }
        for format in TargetFormat.allCases {
            #expect(
                failure {
                    _ = try format.writer(
                        folder.file("disk"), capacity: 512, compression: format == .raw ? nil : .zstd,
                        geometry: QCOW2.Geometry(clusterSize: 4096))
                }?.code == .invalidArgument)
        }
    }
}
