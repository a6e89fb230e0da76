import FlotillaProtocol
import FoundationEssentials
import HostKit
import MigrationModel
import SwiftProtobuf

extension Transitions {
    mutating func notify(_ notification: NotificationRecord) throws {
        guard notifies else { return }
        try store.enqueue(notification)
        effects.notifies = true
    }
}

extension NotificationRecord {
    /// A CloudEvent 1.0 in its JSON format.
    ///
    /// - Parameters:
    ///   - type: "migration.done": the routing key, and after "flotilla." the event's type.
    ///   - data: a JSON object.
    init(type: String, subject: String, at moment: Moment, data: String) {
        let id = UUID().uuidString.lowercased()
        func text(_ value: String) -> String {
            String(decoding: (try? JSONEncoder().encode(value)) ?? Data("\"\"".utf8), as: UTF8.self)
        }
        let time = (try? moment.timestamp.jsonString()) ?? "null"
        let event = """
            {"specversion":"1.0","id":\(text(id)),"source":"/flotilla/coordinator","type":\(text("flotilla.\(type)")),\
            "subject":\(text(subject)),"time":\(time),"datacontenttype":"application/json","data":\(data)}
            """
        self.init(id: id, routingKey: type, body: Array(event.utf8))
    }

    /// The migration's new state. Its data is a `flotilla.v1.Migration` in protobuf's JSON, without the manifest.
    static func of(_ record: MigrationRecord, at moment: Moment) throws -> NotificationRecord {
        var migration = Migration(record, tasks: [], knows: { _ in true })
        migration.clearManifest()
        return NotificationRecord(
            type: "migration.\(record.state.word)", subject: record.id, at: moment, data: try migration.jsonString())
    }

    /// What became of a request. Its data names the migrations, or says why there are none.
    static func answer(
        to request: String, _ result: Result<[String], MigrationError>, at moment: Moment
    ) throws -> NotificationRecord {
        switch result {
        case .success(let ids):
            let data = try SubmitMigrationsResponse.with { $0.migrationIds = ids }.jsonString()
            return NotificationRecord(type: "request.accepted", subject: request, at: moment, data: data)
        case .failure(let error):
            return NotificationRecord(
                type: "request.rejected", subject: request, at: moment, data: try TaskEnded(error).jsonString())
        }
    }
}

extension MigrationState {
    /// As routing keys and types of events have it.
    var word: String {
        switch self {
        case .exporting: "exporting"
        case .converting: "converting"
        case .deploying: "deploying"
        case .done: "done"
        case .failed: "failed"
        case .preflightBlocked: "blocked"
        case .cancelled: "cancelled"
        case .ready: "ready"
        case .rollingBack: "rolling-back"
        case .rolledBack: "rolled-back"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }
}
