import FlotillaProtocol
import SwiftProtobuf
import Synchronization

/// One `flotilla.v1.MigrationEvent` per line, in protobuf's JSON mapping. A migration's last line holds its final
/// state with manifest, result and findings.
final class JSONView: MigrationView {
    private let output = Mutex(())

    func show(_ event: MigrationEvent) {
        var options = JSONEncodingOptions()
        options.alwaysPrintInt64sAsNumbers = true
        guard let line = try? event.jsonString(options: options) else {
            return Console.complain("flotilla: event of migration \(event.migrationID) has no JSON form")
        }
        output.withLock { _ in Console.line(line) }
    }

    func finish(_ migrations: [Migration]) {}
}
