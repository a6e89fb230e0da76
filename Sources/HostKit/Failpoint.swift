import Glibc
import Synchronization

/// Named places where a test can make the process die as if its power was cut. Each stands right after or right
/// before something durable changes. `FLOTILLA_FAILPOINT=name` (or `name:3` for the third time it is reached) sends
/// this process SIGKILL there; without the variable a failpoint costs one comparison. `name=stop` sends SIGSTOP
/// instead, and SIGCONT lets it go on: for breaking something else at that very moment. `name=hang` keeps the thread that
/// gets there, for ever, and no other.
package enum Failpoint: String, CaseIterable, Sendable {
    case coordinatorMigrationStored = "coordinator.migration-stored"
    case coordinatorTaskStored = "coordinator.task-stored"
    case coordinatorTaskSent = "coordinator.task-sent"
    case coordinatorResultStored = "coordinator.result-stored"
    case workerAccepted = "worker.accepted"
    case workerAcceptedPublished = "worker.accepted-published"
    case workerResultJournaled = "worker.result-journaled"
    case workerResultPublished = "worker.result-published"
    /// A shorter journal is durable under another name; and right after it took the journal's.
    case workerJournalWritten = "worker.journal-written"
    case workerJournalReplaced = "worker.journal-replaced"
    case exportManifestWritten = "export.manifest-written"
    case convertImageCreated = "convert.image-created"
    case convertChunkWritten = "convert.chunk-written"
    case convertCheckpoint = "convert.checkpoint"
    case convertImageFinished = "convert.image-finished"
    case convertDiskPublished = "convert.disk-published"
    case deployPermitted = "deploy.permitted"
    case deployDefined = "deploy.defined"
    case deployStarted = "deploy.started"
    /// The devices are reserved and vGPUs made; no domain has them yet.
    case deployClaimed = "deploy.claimed"
    case deployUndefined = "undeploy.undefined"
    /// A vGPU's record is written, the kernel was not asked yet; right after it was; its parameters are set; mdevctl keeps
    /// it; and after one is gone from the kernel, and from mdevctl.
    case gpuVgpuRecorded = "gpu.vgpu-recorded"
    case gpuVgpuCreated = "gpu.vgpu-created"
    case gpuVgpuTuned = "gpu.vgpu-tuned"
    case gpuVgpuKept = "gpu.vgpu-kept"
    case gpuVgpuDestroyed = "gpu.vgpu-destroyed"
    case gpuVgpuForgotten = "gpu.vgpu-forgotten"
    /// A change of a GPU's instances was written down, nothing was touched yet; before every command that changes them;
    /// and after the last, before that is written down.
    case gpuMigJournaled = "gpu.mig-journaled"
    case gpuMigStep = "gpu.mig-step"
    case gpuMigDone = "gpu.mig-done"
    /// A journal of drivers was written, sysfs was not yet.
    case gpuJournaled = "gpu.journaled"
    /// Before every write to sysfs that moves a driver, and after the last.
    case gpuStep = "gpu.step"
    case gpuDone = "gpu.done"

    package static let environmentKey = "FLOTILLA_FAILPOINT"

    private enum Action: String { case kill, stop, hang }

    private static let armed: (name: String, count: Int, action: Action)? = {
        guard let value = getenv(environmentKey).map({ String(cString: $0) }), !value.isEmpty else { return nil }
        let words = value.split(separator: "=", maxSplits: 1)
        let parts = words[0].split(separator: ":", maxSplits: 1)
        let action = words.count > 1 ? Action(rawValue: String(words[1])) : .kill
        guard let action else { fatalError("\(environmentKey)=\(value): no such action") }
        return (String(parts[0]), parts.count > 1 ? Int(parts[1]) ?? 1 : 1, action)
    }()
    private static let reached = Atomic<Int>(0)

    package func hit() {
        guard let armed = Self.armed, armed.name == rawValue else { return }
        if Self.reached.add(1, ordering: .relaxed).newValue == armed.count {
            switch armed.action {
            case .stop:
                kill(getpid(), SIGSTOP)
                return
            case .kill: kill(getpid(), SIGKILL)
            case .hang: break
            }
            // Nothing may happen after the failpoint, also while the signal is on its way.
            while true { pause() }
        }
    }
}
