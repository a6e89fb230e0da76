/// What went wrong, with which object, and what to do next. The only error type that leaves a target.
///
/// - `message` names the object: "disk web-disk1.vmdk: grain at sector 128 lies past the end of the file".
/// - `hint` is the next step for the person reading it, or nil when there is none.
/// - `code` follows gRPC's status codes, so that an error crosses the bus unchanged.
package struct MigrationError: Error, Sendable, CustomStringConvertible {
    /// gRPC status codes, with gRPC's numbers (https://grpc.io/docs/guides/status-codes).
    package enum Code: Int, Sendable, CaseIterable {
        case cancelled = 1
        case unknown = 2
        /// The input is wrong whatever the state of the system: a malformed descriptor, a hostile path.
        case invalidArgument = 3
        case deadlineExceeded = 4
        case notFound = 5
        case alreadyExists = 6
        case permissionDenied = 7
        /// No space, no memory, no free device. Frees itself or can be freed: worth trying again.
        case resourceExhausted = 8
        /// The system is in the wrong state for this: IOMMU off, domain running, source changed.
        case failedPrecondition = 9
        /// A newer attempt owns the task; this one must stop and leave no trace.
        case aborted = 10
        case outOfRange = 11
        case unimplemented = 12
        case `internal` = 13
        /// A service (libvirt, the broker, a vCenter) can't be reached now.
        case unavailable = 14
        /// Data is damaged: truncated, or its checksum differs.
        case dataLoss = 15
        case unauthenticated = 16

        /// Whether the same call may succeed later with nothing changed in its request.
        package var isRetryable: Bool {
            switch self {
            case .unavailable: true
            default: false
            }
        }
    }

    /// Whether unfinished work can be of use to another attempt. What the input itself caused can't be continued.
    package var keepsCheckpoint: Bool {
        switch code {
        case .invalidArgument, .dataLoss, .unimplemented, .alreadyExists, .failedPrecondition: false
        default: true
        }
    }

    package var code: Code
    package var message: String
    package var hint: String?
    package var cause: (any Error)?

    package init(_ code: Code, _ message: String, hint: String? = nil, cause: (any Error)? = nil) {
        self.code = code
        self.message = message
        self.hint = hint
        self.cause = cause
    }

    package var description: String {
        var text = message
        if let cause { text += ": \(cause)" }
        if let hint { text += " (\(hint))" }
        return text
    }
}
