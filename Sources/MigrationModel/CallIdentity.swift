/// One attempt of one task: who is speaking, in every event, permit and file path.
package struct CallIdentity: Hashable, Sendable, CustomStringConvertible {
    package var task: String
    package var attempt: UInt32
    package var fence: UInt64

    package init(task: String, attempt: UInt32, fence: UInt64) {
        self.task = task
        self.attempt = attempt
        self.fence = fence
    }

    package var description: String { "\(task) attempt \(attempt) fence \(fence)" }
}
