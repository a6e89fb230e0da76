import Glibc
import HostKit
package import MigrationModel

/// A folder that is gone when the test is over.
package final class TemporaryFolder: Sendable {
    package let path: String

    /// - Parameter folders: made within it.
    package init(_ folders: String...) throws {
        var template = Array("/tmp/flotilla-test-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw systemError("create a folder in", "/tmp") }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
        for folder in folders { try Files.createDirectories("\(path)/\(folder)") }
    }

    deinit { try? Files.remove(path) }

    package func sub(_ name: String) throws -> String {
        try Files.createDirectories("\(path)/\(name)")
        return "\(path)/\(name)"
    }
}

/// The `MigrationError` that `body` throws; nil when it throws none, or another.
package func failure(_ body: () throws -> some Any) -> MigrationError? {
    do {
        _ = try body()
        return nil
    } catch {
        return error as? MigrationError
    }
}

/// Polls a condition that some other process or task makes true; nil when it did not in time.
package func eventually<Value>(
    within limit: Duration = .seconds(10), _ condition: () async throws -> Value?
) async throws -> Value? {
    let deadline = ContinuousClock.now + limit
    while true {
        if let value = try await condition() { return value }
        guard ContinuousClock.now < deadline else { return nil }
        try await Task.sleep(for: .milliseconds(5))
    }
}
