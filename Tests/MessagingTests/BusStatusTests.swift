import Messaging
import MigrationModel
import Testing

@Suite struct BusStatusTests {
    private static let now = Moment(milliseconds: 1_000_000_000)

    private func status(
        _ state: BusStatus.State = .connected(since: now - .seconds(600)), heard: Duration = .seconds(5),
        consumes: Bool = true
    ) -> BusStatus {
        BusStatus(
            connections: ["publish", "consume"].map {
                .init(name: $0, state: state, lastInbound: Self.now - heard)
            },
            consumers: [.init(queue: "flotilla.tasks.kvm1", activeSince: consumes ? Self.now : nil)])
    }

    @Test func whatWorksPretendsNothing() { #expect(status().pretence(at: Self.now) == nil) }

    @Test func consumerThatTheBrokerDoesNotHave() throws {
        #expect(try #require(status(consumes: false).pretence(at: Self.now)).contains("flotilla.tasks.kvm1"))
    }

    @Test func connectionThatHearsNothing() throws {
        #expect(try #require(status(heard: .seconds(61)).pretence(at: Self.now)).contains("61 s"))
        #expect(status(heard: .seconds(60)).pretence(at: Self.now) == nil)
    }

    /// A bus that knows of its trouble reconnects by itself.
    @Test func reconnectingIsNoPretence() {
        let away = status(.connecting(attempt: 9, lastError: "refused"), heard: .seconds(900), consumes: false)
        #expect(away.pretence(at: Self.now) == nil)
        #expect(!away.isHealthy)
    }
}
