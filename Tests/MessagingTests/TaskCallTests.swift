import Messaging
import MigrationModel
import Testing

@Suite struct TaskCallTests {
    private let call = TaskCall(
        identity: CallIdentity(task: "0f-convert", attempt: 2, fence: 7), method: "flotilla.v1.ConvertService/Convert",
        audience: "kvm1", deadline: Moment(milliseconds: 1_700_000_000_000), body: [1, 2, 3])

    @Test func roundTrip() throws {
        let message = call.message(Names(), messageID: "m1")
        #expect(message.type == "/flotilla.v1.ConvertService/Convert")
        #expect(message.routingKey == "kvm1")
        #expect(try TaskCall(decoding: message, audience: "kvm1") == call)
    }

    @Test(
        arguments: [
            { $0.type = "" }, { $0.type = "/" }, { $0.type = "no-slash" },
            { $0.correlationID = "" }, { $0.correlationID = "../../etc" }, { $0.correlationID = "a/b" },
            { $0.correlationID = "-rf" }, { $0.correlationID = String(repeating: "a", count: 129) },
            { $0.headers["flotilla-attempt"] = nil }, { $0.headers["flotilla-attempt"] = .integer(0) },
            { $0.headers["flotilla-fence"] = .integer(-1) }, { $0.headers["flotilla-fence"] = .string("7") },
            { $0.headers["deadline-unix-ms"] = .integer(.min) }, { $0.headers["deadline-unix-ms"] = .integer(.max) },
            { $0.body = [UInt8](repeating: 0, count: Message.maximumBody + 1) },
        ] as [@Sendable (inout Message) -> Void])
    func malformed(_ damage: @Sendable (inout Message) -> Void) {
        var message = call.message(Names(), messageID: "m1")
        damage(&message)
        #expect { try TaskCall(decoding: message, audience: "kvm1") } throws: {
            ($0 as? MigrationError)?.code == .invalidArgument
        }
    }
}
