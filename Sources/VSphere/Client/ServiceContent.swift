import MigrationModel

/// What a server is, and its singletons.
package struct ServiceContent: Sendable {
    let rootFolder: ObjectReference
    let propertyCollector: ObjectReference
    let viewManager: ObjectReference
    let sessionManager: ObjectReference
    package let about: About

    package struct About: Sendable, Encodable {
        /// "VMware vCenter Server 8.0.1 build-22088981".
        package var product = ""
        /// "VirtualCenter" or "HostAgent".
        package var type = ""
        /// "8.0.1.0".
        package var version = ""
        /// Of a vCenter.
        package var instanceUUID = ""
    }

    init(_ node: VIMNode, server: String) throws {
        func required(_ name: String) throws -> ObjectReference {
            guard let reference = node.reference(name) else {
                throw MigrationError(.unavailable, "\(server): its service content names no \(name)")
            }
            return reference
        }
        rootFolder = try required("rootFolder")
        propertyCollector = try required("propertyCollector")
        viewManager = try required("viewManager")
        sessionManager = try required("sessionManager")
        var about = About()
        about.product = node["about"]?.text("fullName") ?? ""
        about.type = node["about"]?.text("apiType") ?? ""
        about.version = node["about"]?.text("apiVersion") ?? ""
        about.instanceUUID = node["about"]?.text("instanceUuid") ?? ""
        self.about = about
    }

    /// What a request says it was written against, so that the server answers with all properties it knows.
    var action: String {
        let version = about.version
        let isPlain =
            !version.isEmpty && version.count < 32 && version.allSatisfy { $0.isASCII && ($0.isNumber || $0 == ".") }
        return "urn:vim25/\(isPlain ? version : "6.5")"
    }
}
