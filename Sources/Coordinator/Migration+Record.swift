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
    init(_ record: MigrationRecord, tasks: [TaskRecord]) {
        self.init()
        id = record.id
        request = record.request
        state = record.state
        if let manifest = record.manifest { self.manifest = manifest }
        if let result = record.result { self.result = result }
        findings = record.findings
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
