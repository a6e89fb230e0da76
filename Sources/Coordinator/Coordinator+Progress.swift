import FlotillaProtocol
import HostKit
import Messaging
import MigrationModel
import SwiftProtobuf

extension Coordinator {
    /// Progress, or that there is none: told to those who ask, and not stored.
    func hear(_ event: TaskEvent, from host: String, isOld: Bool) async throws {
        switch event.kind {
        case .update(let bytes): try await relay(event, from: host, bytes)
        case .heartbeat(let beat) where !isOld:
            silences.note(event.identity, on: host, seconds: beat.secondsWithoutProgress)
        case .ended: silences.note(event.identity, on: host, seconds: 0)
        default: break
        }
    }

    private func relay(
        _ event: TaskEvent, from host: String, _ bytes: some SwiftProtobufContiguousBytes & Sendable
    ) async throws {
        guard let dash = event.taskID.lastIndex(of: "-"),
            let stage = Stage(rawValue: String(event.taskID[event.taskID.index(after: dash)...]))
        else { return }
        let migrationID = String(event.taskID[..<dash])
        guard watchers.hasWatcher(of: migrationID) else { return }
        // Of the attempt that owns the task: no other host, and no attempt that was given up, speaks for it.
        let task = try await store.write { try $0.task(id: event.taskID) }
        guard let task, task.host == host, task.machine.fence == event.fence else { return }
        let progress: TaskProgress?
        let step: TaskStep?
        switch stage {
        case .export: (progress, step) = try ExportUpdate(serializedBytes: bytes).report
        case .convert: (progress, step) = try ConvertUpdate(serializedBytes: bytes).report
        case .deploy, .undeploy: (progress, step) = try DeployUpdate(serializedBytes: bytes).report
        }
        var notice = MigrationEvent.with {
            $0.migrationID = migrationID
            $0.time = Moment.now.timestamp
        }
        if let progress {
            notice.progress = .with {
                $0.stage = stage.rawValue
                $0.progress = progress
            }
        } else if let step {
            notice.step = .with {
                $0.stage = stage.rawValue
                $0.step = step
            }
        } else {
            return
        }
        watchers.publish(notice)
    }
}

extension ExportUpdate {
    fileprivate var report: (TaskProgress?, TaskStep?) {
        switch update {
        case .progress(let progress): (progress, nil)
        case .step(let step): (nil, step)
        case .result, nil: (nil, nil)
        }
    }
}

extension ConvertUpdate {
    fileprivate var report: (TaskProgress?, TaskStep?) {
        switch update {
        case .progress(let progress): (progress, nil)
        case .step(let step): (nil, step)
        case .result, nil: (nil, nil)
        }
    }
}

extension DeployUpdate {
    fileprivate var report: (TaskProgress?, TaskStep?) {
        switch update {
        case .progress(let progress): (progress, nil)
        case .step(let step): (nil, step)
        case .result, nil: (nil, nil)
        }
    }
}
