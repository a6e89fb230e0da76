package import FlotillaProtocol
package import MigrationModel

/// A VM on its way. Stored with the whole request, so that a restart needs nothing else.
package struct MigrationRecord: Sendable {
    package var id: String
    /// Equal for requests that mean the same migration: source, VM, host, pool and domain name.
    package var key: String
    package var request: SubmitMigrationRequest
    package var state: MigrationState
    /// As captured by the last export, with what later stages added.
    package var manifest: Manifest?
    package var result: DeployResult?
    package var findings: [Finding] = []
    package var error: TaskEnded?
    package var createdAt: Moment
    package var updatedAt: Moment

    package init(
        id: String, key: String, request: SubmitMigrationRequest, state: MigrationState, manifest: Manifest? = nil,
        result: DeployResult? = nil, findings: [Finding] = [], error: TaskEnded? = nil, createdAt: Moment,
        updatedAt: Moment
    ) {
        self.id = id
        self.key = key
        self.request = request
        self.state = state
        self.manifest = manifest
        self.result = result
        self.findings = findings
        self.error = error
        self.createdAt = createdAt
        self.updatedAt = updatedAt
    }
}

/// One stage's task. Its id is the same over all attempts.
package struct TaskRecord: Sendable {
    package var id: String
    package var migrationID: String
    package var stage: Stage
    package var host: String
    /// The stage's request message, serialized.
    package var request: [UInt8]
    package var machine: TaskMachine
    /// When it must have ended; nil: whenever.
    package var deadline: Moment?
    package var startedAt: Moment?
    package var endedAt: Moment?

    package init(migrationID: String, stage: Stage, host: String, request: [UInt8], now: Moment) {
        id = stage.taskID(ofMigration: migrationID)
        self.migrationID = migrationID
        self.stage = stage
        self.host = host
        self.request = request
        machine = TaskMachine(now: now)
    }
}

/// A task message to be published; written in the transaction that decided it.
package struct OutboxRecord: Sendable {
    /// Property `message-id`: the same each time the row is published.
    package var id: String
    package var identity: CallIdentity
    package var method: String
    package var host: String
    package var deadline: Moment?
    package var body: [UInt8]

    package init(
        id: String, identity: CallIdentity, method: String, host: String, deadline: Moment? = nil, body: [UInt8]
    ) {
        (self.id, self.identity, self.method, self.host) = (id, identity, method, host)
        (self.deadline, self.body) = (deadline, body)
    }
}

/// A message that went to the dead letters.
package struct RejectionRecord: Sendable {
    package var rejected: MessageRejected
    /// Who rejected it: a host, or the coordinator.
    package var member: String
    package var at: Moment
}

/// A host and its worker.
package struct HostRecord: Sendable {
    package var profile: HostProfile
    package var seenAt: Moment
    package var isDrained: Bool
    /// Tasks it has, sent or running.
    package var tasks: Int
}

/// What other programs are told; written in the transaction that decided it.
package struct NotificationRecord: Sendable {
    /// Unique; the CloudEvent's id.
    package var id: String
    /// "migration.done".
    package var routingKey: String
    /// A CloudEvent in its JSON format.
    package var body: [UInt8]

    package init(id: String, routingKey: String, body: [UInt8]) {
        (self.id, self.routingKey, self.body) = (id, routingKey, body)
    }
}
