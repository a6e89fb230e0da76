import Convert
import Deploy
import DiskImage
import FlotillaProtocol
import HostKit
import MigrationModel
import SwiftProtobuf
import TestKit
import Testing

@testable import Worker

/// Whether what an earlier attempt left may count for this one.
@Suite struct OriginTests {
    private let folder: TemporaryFolder
    private let work: WorkDirectory

    init() throws {
        folder = try TemporaryFolder()
        work = WorkDirectory(pool: folder.path, task: "m-convert")
    }

    private var image: String { "\(folder.path)/web-disk0.qcow2" }

    /// The attempt that published it died before it could say so.
    @Test(arguments: ["as it was", "changed"]) func publishedImageIsOfItsSource(_ source: String) throws {
        let raw = "\(folder.path)/source.raw"
        try Files.writeAtomically(Array(repeating: 7, count: 1 << 20), to: raw)
        let first = try work.adopt(fence: 1, of: "as it was")
        _ = try DiskConversion(
            source: FileRegion(path: raw), sourceFormat: .raw, targetFormat: .qcow2, workDirectory: first,
            name: "disk0", finalPath: image
        ).run()
        try Files.writeAtomically([1], to: "\(first)/disk1.raw")
        let second = try work.adopt(fence: 2, of: source)
        let isSame = source == "as it was"
        #expect(Files.exists(image) == isSame)
        #expect(Files.exists("\(second)/disk1.raw") == isSame)
        #expect(Files.exists("\(second)/disk0.checkpoint") == isSame)
        #expect(try work.adopt(fence: 2, of: source) == second)
        #expect(Files.exists(raw))
    }

    private func staging(_ work: String) -> Staging {
        Staging(
            path: "\(work)/disk0.vmdk", format: .vmdk, keptAs: "\(folder.path)/web-disk0.vmdk", isLasting: false
        ) { path, _, _ in try Files.writeAtomically([1, 2, 3], to: path) }
    }

    /// A VMDK that is kept beside its image goes with it, whichever process is asked for that.
    @Test(arguments: ["cancelled", "changed", "withdrawn", "somebody's", "done"])
    func keptFileIsOfItsTask(_ end: String) throws {
        let kept = "\(folder.path)/web-disk0.vmdk"
        let first = try work.adopt(fence: 1, of: "as it was")
        try Files.writeAtomically([1, 2, 3], to: "\(first)/disk0.vmdk")
        try staging(first).keep()
        #expect(Files.exists(kept))
        switch end {
        case "cancelled": try work.remove(keepsResult: false)
        case "changed": _ = try work.adopt(fence: 2, of: "something else")
        case "withdrawn": try staging(try work.adopt(fence: 2, of: "as it was")).withdraw()
        case "somebody's":
            try Files.writeAtomically([4, 5, 6], to: kept)
            try work.remove(keepsResult: false)
        default: try work.remove()
        }
        #expect(Files.exists(kept) == ["somebody's", "done"].contains(end))
    }

    private func request(_ url: String) -> ConvertRequest {
        .with {
            $0.manifest.source = .with { ($0.kind, $0.url, $0.fingerprint) = (.vsphere, url, "f") }
            $0.manifest.disks = [
                .with {
                    $0.id = "disk0"
                    $0.target.path = image
                }
            ]
            ($0.convertedFingerprint, $0.domainName, $0.format) = ("f", "web", "qcow2")
        }
    }

    /// A running VM's fingerprint says nothing of what is on its disks.
    @Test func imagesOfASnapshotAreOfItsMoment() throws {
        try Files.writeAtomically([1], to: image)
        let pool = PoolFolder(name: "p", path: folder.path)
        let off = request("vsphere://u@vc/?vm=web"), snapshot = request("vsphere://u@vc/?vm=web&snapshot=1")
        #expect(try keptDisks(off, pool, .qcow2)?.count == 1)
        let error = try #require(failure { _ = try keptDisks(snapshot, pool, .qcow2) })
        #expect(error.code == .failedPrecondition && error.message.contains("snapshot"))
        #expect(try origin(of: off) == origin(of: off))
        #expect(try origin(of: snapshot) != origin(of: snapshot))
    }
}
