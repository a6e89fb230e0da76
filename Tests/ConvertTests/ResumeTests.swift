import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@Suite struct ResumeTests {
    private static var everyChunk: DiskConversion.Options {
        var options = DiskConversion.Options()
        options.checkpointBytes = 1
        options.threads = 2
        return options
    }

    /// A scene whose conversion was killed, with SIGKILL, when it reached `failpoint`.
    private func interrupted(_ failpoint: String, _ target: TargetFormat) async throws -> Scene {
        let scene = try Scene(target, options: Self.everyChunk)
        let (source, work, final) = (
            scene.conversion.source.path, scene.conversion.workDirectory, scene.conversion.finalPath
        )
        await #expect(processExitsWith: .signal(SIGKILL)) {
            [
                failpoint = failpoint as String, target = target.rawValue as String, source = source as String,
                work = work as String, final = final as String
            ] in
            setenv(Failpoint.environmentKey, failpoint, 1)
            var options = DiskConversion.Options()
            options.checkpointBytes = 1
            options.threads = 2
            _ = try DiskConversion(
                source: FileRegion(path: source), sourceFormat: .vmdk,
                targetFormat: try #require(TargetFormat(rawValue: target)), workDirectory: work, name: "disk0",
                finalPath: final, options: options
            ).run()
        }
        return scene
    }

    @Test(
        arguments: [
            "convert.image-created", "convert.chunk-written:3", "convert.checkpoint", "convert.checkpoint:3",
            "convert.image-finished", "convert.disk-published",
        ], TargetFormat.allCases)
    func continuesAfterDyingAnywhere(_ failpoint: String, _ target: TargetFormat) async throws {
        let scene = try await interrupted(failpoint, target)
        let published = failpoint == "convert.disk-published"
        #expect(Files.exists(scene.conversion.finalPath) == published)
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        #expect(result.notice == (published ? .alreadyPublished : .resumed))
        if failpoint.hasPrefix("convert.checkpoint") { #expect(last.map { $0.resumedBytes > 0 } == true) }
        if failpoint == "convert.image-finished" { #expect(last?.writtenBytes == 0) }
        try scene.judge(result)
    }

    /// Its process died before it could tell, and somebody asks for another source's.
    @Test(arguments: ["the same", "another source", "other options"])
    func aPublishedImageIsOfItsSource(_ what: String) async throws {
        let scene = try await interrupted("convert.disk-published", .qcow2)
        var conversion = scene.conversion
        conversion.comparesPublished = true
        if what == "other options" { conversion.options.checksum = .none }
        if what == "another source" {
            try makeRawDisk(scene.folder.file("made.raw"), size: 40 << 20, seed: 41)
            _ = try SourceKind.stream.make(from: scene.folder.file("made.raw"), in: scene.folder)
        }
        if what == "the same" {
            #expect(try conversion.run().notice == .alreadyPublished)
        } else {
            let error = failure { _ = try conversion.run() }
            #expect(error?.code == .alreadyExists && error?.message.contains("nothing proves") == true)
        }
        #expect(Files.exists(conversion.finalPath))
    }

    @Test(arguments: TargetFormat.allCases)
    func tamperedChunksAreConvertedAnew(_ target: TargetFormat) async throws {
        let scene = try await interrupted("convert.checkpoint:3", target)
        let log = try Files.read(scene.conversion.checkpointPath)
        let records = stride(from: 64, to: log.count - 63, by: 64).map { Array(log[$0..<$0 + 64]) }
        let image = try File(scene.conversion.partialPath, O_RDWR)
        for record in records.prefix(2) {
            let place = record[16..<24].reversed().reduce(0) { $0 << 8 | UInt64($1) }
            // In a raw image also a byte that belongs to a hole.
            for offset in target == .raw ? [place, place + 63 * 65536] : [place + 77] {
                try image.write([0xFF], at: offset)
            }
        }
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        #expect(result.notice == .resumed)
        #expect(last.map { $0.resumedBytes >= UInt64(records.count - 2) * 4 << 20 } == true)
        try scene.judge(result)
    }

    @Test func aChangedSourceStartsOver() async throws {
        let scene = try await interrupted("convert.checkpoint:3", .qcow2)
        try makeRawDisk(scene.folder.file("made.raw"), size: 40 << 20, seed: 41)
        _ = try SourceKind.stream.make(from: scene.folder.file("made.raw"), in: scene.folder)
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        #expect(result.notice == .restarted && last?.resumedBytes == 0)
        #expect(result.contentDigest == (try documentedDigest(scene.folder.file("made.raw"))))
        try run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", scene.folder.file("made.raw"), result.path)
    }

    @Test(arguments: [1, 37, 63])
    func aTornTailIsCut(_ extra: Int) async throws {
        let scene = try await interrupted("convert.checkpoint:3", .qcow2)
        let log = try File(scene.conversion.checkpointPath, O_RDWR)
        let size = try log.size
        let tail = try log.readExactly(at: size - 64, count: extra)
        try log.write(tail, at: size)
        let result = try scene.conversion.run()
        #expect(result.notice == .resumed)
        try scene.judge(result)
        #expect(try log.size % 64 == 0)
    }

    @Test func aDamagedRecordEndsTheLog() async throws {
        let scene = try await interrupted("convert.checkpoint:3", .qcow2)
        let log = try File(scene.conversion.checkpointPath, O_RDWR)
        try log.write([0xFF], at: 64 + 40)
        var last: DiskConversion.Progress?
        let result = try scene.conversion.run { last = $0 }
        #expect(result.notice == .resumed && last?.resumedBytes == 0)
        try scene.judge(result)
    }

    @Test func anUnreadableLogStartsOver() async throws {
        let scene = try await interrupted("convert.checkpoint:3", .qcow2)
        try File(scene.conversion.checkpointPath, O_RDWR).write([0xFF], at: 3)
        let result = try scene.conversion.run()
        #expect(result.notice == .restarted)
        try scene.judge(result)
    }

    /// Dying again and again, each time a little further, ends with the right image and no leaks in it.
    @Test(arguments: TargetFormat.allCases)
    func survivesRepeatedDeaths(_ target: TargetFormat) async throws {
        let scene = try await interrupted("convert.chunk-written:2", target)
        let (source, work, final) = (
            scene.conversion.source.path, scene.conversion.workDirectory, scene.conversion.finalPath
        )
        for failpoint in ["convert.chunk-written:3", "convert.checkpoint:2", "convert.image-finished"] {
            await #expect(processExitsWith: .signal(SIGKILL)) {
                [
                    failpoint = failpoint as String, target = target.rawValue as String, source = source as String,
                    work = work as String, final = final as String
                ] in
                setenv(Failpoint.environmentKey, failpoint, 1)
                var options = DiskConversion.Options()
                options.checkpointBytes = 1
                options.threads = 3
                _ = try DiskConversion(
                    source: FileRegion(path: source), sourceFormat: .vmdk,
                    targetFormat: try #require(TargetFormat(rawValue: target)), workDirectory: work, name: "disk0",
                    finalPath: final, options: options
                ).run()
            }
        }
        try scene.judge(try scene.conversion.run())
    }
}
