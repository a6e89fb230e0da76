import FlotillaProtocol
import GRPCCore
import MigrationModel
import SwiftProtobuf

extension Stage {
    var method: String {
        switch self {
        case .export: ExportService.Method.Export.descriptor.fullyQualifiedMethod
        case .convert: ConvertService.Method.Convert.descriptor.fullyQualifiedMethod
        case .deploy: DeployService.Method.Deploy.descriptor.fullyQualifiedMethod
        case .undeploy: DeployService.Method.Undeploy.descriptor.fullyQualifiedMethod
        }
    }
}

extension MigrationState {
    package var isFinal: Bool {
        switch self {
        case .done, .failed, .preflightBlocked, .cancelled, .ready, .rolledBack: true
        case .exporting, .converting, .deploying, .rollingBack, .unspecified, .UNRECOGNIZED: false
        }
    }
}

extension TaskEnded {
    init(_ error: MigrationError) {
        self.init()
        code = Int32(error.code.rawValue)
        message = error.message
        hint = error.hint ?? ""
    }
}

extension Migration {
    /// - Parameter knows: whether the coordinator has a key of a host.
    init(_ record: MigrationRecord, tasks: [TaskRecord], knows: (String) -> Bool) {
        self.init()
        id = record.id
        request = record.request
        state = record.state
        if let manifest = record.manifest { self.manifest = manifest }
        if let result = record.result { self.result = result }
        findings = record.findings
        if !state.isFinal, !knows(request.host) { findings.append(.waits(id, for: request.host)) }
        if let error = record.error {
            errorCode = error.code
            errorMessage = error.message
            errorHint = error.hint
        }
        createdAt = record.createdAt.timestamp
        updatedAt = record.updatedAt.timestamp
        // One that was taken back before it was done again is past.
        let isBack = [.rollingBack, .rolledBack, .failed, .cancelled].contains(record.state)
        stages = tasks.filter { $0.stage != .undeploy || isBack }.map { task in
            .with {
                $0.name = task.stage.rawValue
                $0.taskID = task.id
                $0.host = task.host
                $0.attempt = task.machine.attempt
                $0.state = task.machine.state.name
                if let started = task.startedAt { $0.startedAt = started.timestamp }
                if let ended = task.endedAt { $0.endedAt = ended.timestamp }
            }
        }
    }
}

extension Finding {
    /// Of a migration that is open while the coordinator has no key of its host.
    fileprivate static func waits(_ migration: String, for host: String) -> Finding {
        let error = MigrationError.forgotten(host)
        return .with {
            $0.severity = .warning
            $0.subject = enrollment
            $0.message = "it waits: \(error.message)"
            $0.remedy = (error.hint ?? "") + "; or end it: flotilla migration cancel \(migration)"
        }
    }

    /// The subject of what is said of a host that the coordinator has no key of.
    package static let enrollment = "enrollment"
}

extension MigrationError {
    static func forgotten(_ host: String) -> MigrationError {
        MigrationError(
            .failedPrecondition,
            "the coordinator has no key of host \(host), which gets no tasks and isn't heard",
            hint: "let it join again: flotilla worker enroll --host \(host) there, then flotilla host enroll here")
    }
}

extension TaskMachine.State {
    var name: String {
        switch self {
        case .waiting: "waiting"
        case .sent: "sent"
        case .running: "running"
        case .succeeded: "succeeded"
        case .failed: "failed"
        case .cancelled: "cancelled"
        }
    }
}
