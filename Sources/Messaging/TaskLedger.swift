package import FlotillaProtocol
package import MigrationModel

/// What a worker remembers of tasks across its own crashes. Every method is durable when it returns.
package protocol TaskLedger: Sendable {
    /// Decides about a delivered task, and takes it on if it is to run.
    func admit(_ call: TaskCall) async throws -> Admission

    /// Keeps how an attempt ended until the coordinator says that it has it.
    func recordEnd(of call: CallIdentity, _ event: TaskEvent) async throws

    /// Keeps that an attempt was stopped in order, since the process ends.
    func recordStop(of call: CallIdentity) async throws

    /// The coordinator has the result: clean up after the task and forget it.
    /// Does nothing unless this fence's end is what the ledger holds. The caller admits no attempt of the task meanwhile.
    func acknowledge(task: String, fence: UInt64) async throws

    /// The task was cancelled under this fence, and nobody works on it here: clean up after it.
    /// Does nothing while the ledger holds a later attempt, or an end that is to be confirmed; returns false then. The
    /// caller admits no attempt of the task meanwhile.
    func discard(task: String, fence: UInt64) async throws -> Bool

    /// Ends that the coordinator has not confirmed.
    func unacknowledged() async -> [TaskEvent]
}

package enum Admission: Sendable, Equatable {
    /// Taken on: run it.
    case run
    /// A larger fence was seen: someone else, or a later attempt here, owns the task.
    case stale
    /// An earlier attempt of the same request ended well and its result never reached the coordinator.
    case ended(TaskEnded)
}
