import Glibc
import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Worker

@Suite struct SourceFoldersTests {
    private let folder: TemporaryFolder
    private let path: String

    init() throws {
        folder = try TemporaryFolder()
        path = try Files.canonical(folder.path)
        for name in ["here", "here-too", "elsewhere"] {
            try Files.createDirectories("\(path)/\(name)")
            try Files.writeAtomically([1], to: "\(path)/\(name)/web.ova")
        }
        try #require(symlink("\(path)/elsewhere", "\(path)/link") == 0)
        try #require(symlink("\(path)/elsewhere/web.ova", "\(path)/here/out.ova") == 0)
    }

    private func allows(_ file: String, _ folders: [String]) throws -> Bool {
        let configuration = WorkerConfiguration(
            host: "kvm1", libvirtURI: "test:///default", pools: [],
            sourceFolders: folders.map { $0.isEmpty ? "" : "\(path)/\($0)" }, stateDirectory: path)
        let error = failure { try configuration.requireSource("\(path)/\(file)") }
        if let error { #expect(error.code == .permissionDenied && error.message.contains(file)) }
        return error == nil
    }

    /// One that is not mounted now, say.
    @Test func aFolderThatIsAwayKeepsNoOther() throws {
        #expect(try allows("here/web.ova", ["away", "here"]))
        #expect(try allows("link/web.ova", ["away", "link"]))
        #expect(try !allows("elsewhere/web.ova", ["away", "here"]))
    }

    @Test func whatLiesElsewhereIsRefused() throws {
        #expect(try !allows("here-too/web.ova", ["here"]))
        #expect(try !allows("here/out.ova", ["here"]))
        #expect(try !allows("here/web.ova", [""]))
        #expect(try !allows("here/web.ova", []))
        #expect(try allows("here/out.ova", ["here", "link"]))
        #expect(try allows("elsewhere/web.ova", ["link/"]))
    }
}
