import FlotillaProtocol
import SwiftProtobuf
import Testing

@testable import Coordinator

/// Clients that stopped reading.
@Suite(.timeLimit(.minutes(1))) struct WatchersTests {
    private func state(_ state: MigrationState) -> Migration {
        .with { ($0.id, $0.state) = ("m", state) }
    }

    @Test func aWatcherThatDoesNotReadMissesTheOldestAndNotTheEnd() async {
        let watchers = Watchers()
        let events = watchers.watch("m")
        for number in 1...1000 {
            watchers.publish(
                .with {
                    $0.migrationID = "m"
                    $0.progress.progress.bytesDone = UInt64(number)
                })
        }
        watchers.publish(state(.failed))
        #expect(!watchers.hasWatcher(of: "m"))
        // Another run, which this watch is not about.
        for _ in 1...1000 { watchers.publish(state(.exporting)) }
        var heard: [MigrationEvent] = []
        for await event in events { heard.append(event) }
        #expect(heard.count == Watchers.buffered)
        #expect(heard.last?.state.state == .failed)
        #expect(heard.dropLast().map(\.progress.progress.bytesDone) == Array(746...1000))
    }
}
