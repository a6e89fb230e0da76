import Messaging
import MigrationModel
import Testing

@Suite struct BusStatusTests {
    private static let now = Moment(milliseconds: 1_000_000_000)

    private func status(
        _ state: BusStatus.State = .connected(since: now - .seconds(600)), heard: Duration = .seconds(5),
        consumes: Bool = true, held: Duration? = nil, heartbeat: Duration = .seconds(10)
    ) -> BusStatus {
        BusStatus(
            connections: ["publish", "consume"].map {
                .init(name: $0, state: state, lastInbound: Self.now - heard, heartbeat: heartbeat)
            },
            consumers: [
                .init(
                    queue: "flotilla.tasks.kvm1", activeSince: consumes ? Self.now : nil,
                    held: held.map { .init(name: "task m-convert", duration: $0) })
            ])
    }

    private func pretence(_ status: BusStatus) -> String? { status.pretence(at: Self.now, longestHold: .seconds(180)) }

    @Test func whatWorksPretendsNothing() { #expect(pretence(status()) == nil) }

    @Test func consumerThatTheBrokerDoesNotHave() throws {
        #expect(try #require(pretence(status(consumes: false))).contains("flotilla.tasks.kvm1"))
    }

    @Test func connectionThatHearsNothing() throws {
        #expect(try #require(pretence(status(heard: .seconds(61)))).contains("61 s"))
        #expect(pretence(status(heard: .seconds(60))) == nil)
        // A broker that speaks every ten minutes has nothing to say in nine.
        #expect(pretence(status(heard: .seconds(1800), heartbeat: .seconds(600))) == nil)
        #expect(pretence(status(heard: .seconds(1801), heartbeat: .seconds(600))) != nil)
    }

    @Test func deliveryThatNobodySettles() throws {
        let problem = try #require(pretence(status(held: .seconds(181))))
        for part in ["task m-convert", "flotilla.tasks.kvm1", "181 s"] { #expect(problem.contains(part)) }
        #expect(pretence(status(held: .seconds(180))) == nil)
    }

    /// A bus that knows of its trouble reconnects by itself.
    @Test func reconnectingIsNoPretence() {
        let away = status(.connecting(attempt: 9, lastError: "refused"), heard: .seconds(900), consumes: false)
        #expect(pretence(away) == nil)
        #expect(!away.isHealthy)
    }
}
