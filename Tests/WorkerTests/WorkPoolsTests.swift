import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Worker

/// A pool that is away, or can't be looked at, must not count as one in which nothing is left.
@Suite struct WorkPoolsTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private func pool(_ name: String, isMounted: Bool = false) throws -> WorkPools.Pool {
        let path = "\(folder.path)/\(name)"
        try Files.createDirectories(path)
        _ = try WorkDirectory(pool: path, task: "m-convert").adopt(fence: 1)
        return .init(path: path, isMounted: isMounted)
    }

    @Test func onePoolThatIsAwayKeepsNoOther() throws {
        var away = try pool("away")
        away.path += "/not-mounted"
        let unmounted = try pool("unmounted", isMounted: true)
        let there = try pool("there")
        for pool in [away, unmounted] {
            let pools = WorkPools([pool, there])
            let error = try #require(failure { try pools.remove("m-convert", keepsResult: false) })
            #expect(error.code == .unavailable && error.message.contains(pool.path) && error.hint != nil)
            #expect(try Files.list(there.path).isEmpty)
        }
        #expect(Files.exists("\(unmounted.path)/.flotilla/m-convert/1"))
        try WorkPools([there]).remove("m-convert", keepsResult: false)
    }

    /// Any error but that there is nothing: here of a path that is as long as one may be.
    @Test func whatCannotBeLookedAtIsNotGone() throws {
        let path = folder.path + String(repeating: "/.", count: (4090 - folder.path.utf8.count) / 2)
        #expect(Files.isDirectory(path))
        #expect(failure { try WorkDirectory(pool: path, task: "m-convert").remove() } != nil)
        let long = "\(folder.path)/\(String(repeating: "x", count: 300))"
        #expect(failure { _ = try Files.isThere(long) } != nil)
        #expect(failure { try Files.remove(long) } != nil)
        #expect(try !Files.isThere("\(folder.path)/none") && Files.isThere(folder.path))
        try Files.remove("\(folder.path)/none")
    }

    @Test func mountPoints() {
        #expect(Files.isMountPoint("/proc") && !Files.isMountPoint(folder.path))
        #expect(!Files.isMountPoint("\(folder.path)/none"))
    }
}
