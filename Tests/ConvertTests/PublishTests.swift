import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import Synchronization
import TestKit
import Testing

/// A conversion of a 40 MiB stream in a folder of its own.
struct Scene {
    let folder: TemporaryFolder
    let conversion: DiskConversion
    let digest: String

    init(_ target: TargetFormat = .qcow2, options: DiskConversion.Options = DiskConversion.Options()) throws {
        folder = try TemporaryFolder("work")
        try makeRawDisk(folder.file("made.raw"), size: 40 << 20, seed: 40)
        conversion = DiskConversion(
            source: FileRegion(path: try SourceKind.stream.make(from: folder.file("made.raw"), in: folder)),
            sourceFormat: .vmdk, targetFormat: target, workDirectory: folder.file("work"), name: "disk0",
            finalPath: folder.file("disk.\(target)"), options: options)
        digest = try documentedDigest(folder.file("made.raw"))
    }

    func judge(_ result: DiskConversion.Result) throws {
        #expect(result.contentDigest == digest)
        if result.format == .qcow2 { try run("qemu-img", "check", "-f", "qcow2", result.path) }
        try run(
            "qemu-img", "compare", "-f", "raw", "-F", result.format.rawValue, folder.file("made.raw"), result.path)
    }
}

@Suite struct PublishTests {
    @Test func aWrongManifestDigestPublishesNothing() throws {
        var options = DiskConversion.Options()
        options.expectedDigests = [.sha1: String(repeating: "0", count: 40)]
        let scene = try Scene(options: options)
        let source = try Files.read(scene.conversion.source.path)
        let error = try #require(failure { _ = try scene.conversion.run() })
        #expect(error.code == .dataLoss)
        #expect(error.message.contains(scene.conversion.source.path))
        #expect(error.message.contains(hex(Digest.hash(.sha1, source))))
        #expect(error.message.contains(String(repeating: "0", count: 40)))
        #expect(!Files.exists(scene.conversion.finalPath))
        #expect(try Files.read(scene.conversion.source.path) == source)
    }

    @Test func anExistingTargetIsNotTouched() throws {
        let scene = try Scene()
        try File(scene.conversion.finalPath, O_RDWR | O_CREAT).write([1, 2, 3], at: 0)
        let error = try #require(failure { _ = try scene.conversion.run() })
        #expect(error.code == .alreadyExists && error.hint != nil)
        #expect(try Files.read(scene.conversion.finalPath) == [1, 2, 3])
    }

    /// The name is taken after the conversion began: by another process, just before publishing.
    @Test func aTargetThatAppearsMeanwhileIsNotReplaced() throws {
        let scene = try Scene()
        let error = failure {
            _ = try scene.conversion.run { _ in
                _ = try? File(scene.conversion.finalPath, O_RDWR | O_CREAT).write([9], at: 0)
            }
        }
        #expect(error?.code == .alreadyExists)
        #expect(try Files.read(scene.conversion.finalPath) == [9])
        try Files.remove(scene.conversion.finalPath)
        let result = try scene.conversion.run()
        #expect(result.notice == .resumed)
        try scene.judge(result)
    }

    @Test func publishingTwiceIsTheSame() throws {
        let scene = try Scene()
        let first = try scene.conversion.run()
        // The source may be gone by then.
        try Files.remove(scene.conversion.source.path)
        var second = try scene.conversion.run()
        #expect(second.notice == .alreadyPublished)
        second.notice = first.notice
        second.directWrites = first.directWrites
        #expect(second == first)
    }

    @Test func aSourceThatChangesMeanwhileIsNotPublished() throws {
        let scene = try Scene()
        let error = failure {
            _ = try scene.conversion.run { _ in
                let file = try? File(scene.conversion.source.path, O_WRONLY)
                try? file?.truncate(to: (file?.size ?? 0) + 512)
            }
        }
        #expect(error?.code == .failedPrecondition)
        #expect(error?.message.contains("changed while it was converted") == true)
        #expect(!Files.exists(scene.conversion.finalPath))
    }

    @Test func twoConversionsDoNotShareAWorkDirectory() throws {
        let scene = try Scene()
        let inner = Mutex<MigrationError?>(nil)
        _ = try scene.conversion.run { _ in
            let error = failure { _ = try scene.conversion.run() }
            inner.withLock { $0 = error }
        }
        #expect(inner.withLock { $0?.code } == .unavailable)
    }

    @Test func stopsWithTheReasonGiven() throws {
        let scene = try Scene()
        let stop = StopFlag()
        stop.set(MigrationError(.aborted, "a newer attempt owns this"))
        #expect(failure { _ = try scene.conversion.run(stop: stop) }?.code == .aborted)
        #expect(!Files.exists(scene.conversion.finalPath))
        try scene.judge(try scene.conversion.run())
    }

    @Test(.enabled(if: getuid() == 0), arguments: TargetFormat.allCases)
    func aFullFileSystemIsReportedAndSpaceContinuesIt(_ target: TargetFormat) throws {
        let scene = try Scene(target)
        let volume = scene.folder.file("volume")
        try Files.createDirectories(volume)
        try run("mount", "-t", "tmpfs", "-o", "size=1m", "flotilla-test", volume)
        // A thread that is about to end may hold a file a little longer.
        defer { _ = try? run("umount", "--lazy", volume) }
        let conversion = DiskConversion(
            source: scene.conversion.source, sourceFormat: .vmdk, targetFormat: target, workDirectory: volume,
            name: "disk0", finalPath: "\(volume)/disk")
        let error = try #require(failure { _ = try conversion.run() })
        #expect(error.code == .resourceExhausted && error.hint != nil)
        #expect(error.message.contains(conversion.partialPath) || error.message.contains(conversion.checkpointPath))
        #expect(!Files.exists(conversion.finalPath) && Files.exists(conversion.partialPath))
        try run("mount", "-o", "remount,size=64m", volume)
        let result = try conversion.run()
        #expect(result.notice == .resumed)
        try scene.judge(result)
    }

    /// Of a task that was cancelled after its images had their names. What somebody wrote to since is theirs.
    @Test(arguments: [true, false]) func whatNobodyWantsIsRemovedUnlessItWasWrittenTo(_ isInUse: Bool) throws {
        let scene = try Scene()
        let conversion = DiskConversion(
            source: scene.conversion.source, sourceFormat: .vmdk, targetFormat: .qcow2,
            workDirectory: scene.folder.file("work"), name: "disk0", finalPath: scene.folder.file("web-disk0.qcow2"))
        _ = try conversion.run()
        try run("cp", "-a", conversion.finalPath, scene.folder.file("other-disk0.qcow2"))
        if isInUse {
            let file = try File(conversion.finalPath, O_RDWR)
            try file.write(try file.readExactly(at: 0, count: 1), at: 0)
        }
        for _ in 1...2 {
            try DiskConversion.removePublished(
                workDirectory: scene.folder.file("work"), from: Files.parent(of: conversion.finalPath))
        }
        #expect(Files.exists(conversion.finalPath) == isInUse)
        #expect(Files.exists(scene.folder.file("other-disk0.qcow2")))
        #expect(Files.exists(conversion.source.path))
    }
}
