import Export
package import MigrationModel

/// A fault of the API: its type and what the server says about it.
package struct VIMFault: Error, Sendable, CustomStringConvertible {
    /// "NotAuthenticated", "InvalidLogin", "TaskInProgress"…; empty for a fault of the transport.
    package let type: String
    package let message: String
    /// The fault's own properties.
    package let detail: VIMNode?

    init(type: String, message: String, detail: VIMNode? = nil) {
        self.type = type
        self.message = message
        self.detail = detail
    }

    /// A SOAP fault's element.
    init(soap node: VIMNode) {
        let fault = node["detail"]?.children.first
        var type = fault?.type ?? ""
        // Without xsi:type the element is named after it: InvalidLoginFault.
        if type.isEmpty, let name = fault?.name { type = name.hasSuffix("Fault") ? String(name.dropLast(5)) : name }
        self.init(type: type, message: (node.text("faultstring") ?? "").trimmed.printable, detail: fault)
    }

    /// A `LocalizedMethodFault`, as tasks and leases carry it.
    init(localized node: VIMNode) {
        let fault = node["fault"]
        let message = node.text("localizedMessage") ?? ""
        self.init(type: fault?.type ?? "", message: message.trimmed.printable, detail: fault)
    }

    package var description: String {
        switch (type.isEmpty, message.isEmpty) {
        case (false, false): "\(message) (\(type))"
        case (true, false): message
        case (false, true): type
        case (true, true): "an unknown fault"
        }
    }

    /// - Parameter subject: what was asked of what: "vcenter.example: CreateSnapshot_Task of VM web".
    package func error(_ subject: String) -> MigrationError {
        let (code, hint): (MigrationError.Code, String?) =
            switch type {
            case "InvalidLogin": (.unauthenticated, "check user and password; after too many the account is locked")
            case "NotAuthenticated": (.unavailable, "the session ended; run the same command again")
            case "RestrictedVersion":
                (
                    .permissionDenied,
                    "a host with a free license only lets itself be read: license it, or export the VM to an OVA"
                )
            case "NoPermission":
                (
                    .permissionDenied,
                    "give the account that privilege: \(detail?.text("privilegeId") ?? "see the fault")"
                )
            case "ManagedObjectNotFound": (.notFound, "it was removed on the server meanwhile")
            case "TaskInProgress", "ConcurrentAccess", "HostCommunication", "HostNotConnected", "HostNotReachable",
                "Timedout", "ResourceInUse":
                (.unavailable, nil)
            case "InvalidPowerState", "InvalidState", "FileLocked", "SnapshotFault", "ToolsUnavailable":
                (.failedPrecondition, nil)
            case "InvalidArgument", "InvalidProperty", "InvalidType", "InvalidRequest": (.internal, nil)
            case "NotSupported", "MethodNotFound": (.unimplemented, nil)
            default: (.unknown, nil)
            }
        return MigrationError(code, "\(subject): \(description)", hint: hint)
    }
}
