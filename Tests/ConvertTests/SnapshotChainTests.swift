import Convert
import DiskImage
import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

/// Snapshot deltas as qemu-img makes them: parentCID and parentFileNameHint in an embedded descriptor.
@Suite struct SnapshotChainTests {
    /// base.vmdk, one.vmdk on it, two.vmdk on that; returns the raw disk the guest on two.vmdk sees.
    private func makeChain(_ folder: TemporaryFolder) throws -> String {
        try makeRawDisk(folder.file("made.raw"), size: 70 << 20, seed: 12)
        let base = folder.file("base.vmdk")
        try run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", folder.file("made.raw"), base)
        var parent = base
        for (name, writes) in [("one", ["write -P 1 1M 200k", "write -P 2 40M 64k"]), ("two", ["write -P 3 1M 64k"])] {
            let child = folder.file("\(name).vmdk")
            try run("qemu-img", "create", "-f", "vmdk", "-b", parent, "-F", "vmdk", child)
            for write in writes { try run("qemu-io", "-f", "vmdk", "-c", write, child) }
            parent = child
        }
        try run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", parent, folder.file("judged.raw"))
        return folder.file("judged.raw")
    }

    @Test(arguments: TargetFormat.allCases)
    func followsTheChain(_ target: TargetFormat) throws {
        let folder = try TemporaryFolder("work")
        let judged = try makeChain(folder)
        let result = try DiskConversion(
            source: FileRegion(path: folder.file("two.vmdk")), sourceFormat: .vmdk, targetFormat: target,
            workDirectory: folder.file("work"), name: "disk0", finalPath: folder.file("disk")
        ).run()
        #expect(result.contentDigest == (try documentedDigest(judged)))
        try run("qemu-img", "compare", "-f", "raw", "-F", target.rawValue, judged, result.path)
    }

    @Test func aChangedOrMissingParentIsRefused() throws {
        let folder = try TemporaryFolder("work")
        _ = try makeChain(folder)
        let child = FileRegion(path: folder.file("two.vmdk"))
        // Writing to the parent gives it a new CID.
        try run("qemu-io", "-f", "vmdk", "-c", "write -P 9 2M 64k", folder.file("one.vmdk"))
        let error = failure { _ = try DiskFormat.vmdk.open(child) }
        #expect(error?.code == .failedPrecondition && error?.message.contains("one.vmdk") == true)
        try Files.remove(folder.file("one.vmdk"))
        #expect(failure { _ = try DiskFormat.vmdk.open(child) }?.code == .notFound)
    }
}
