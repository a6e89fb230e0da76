import HostKit
import MigrationModel

/// Properties wanted of the objects of one type.
struct PropertySpec {
    let type: String
    var paths: [String]

    init(_ type: String, _ paths: [String]) {
        self.type = type
        self.paths = paths
    }

    var xml: String {
        XML.element(
            "propSet",
            [XML.text("type", type), XML.flag("all", false)] + paths.map { XML.text("pathSet", $0) })
    }
}

extension VIMClient {
    /// Every object of the specs' types below a container, one by one, each once. A session or a connection that ends
    /// between two pages, or inside one, costs the pages again, not the objects.
    ///
    /// - Parameter pageSize: objects the server sends at most in one answer.
    func retrieve(
        _ specs: [PropertySpec], below container: ObjectReference, pageSize: Int, stop: StopFlag,
        _ take: (ObjectContent) throws -> Void
    ) throws {
        var taken: Set<ObjectReference> = []
        var attempts = 0
        while true {
            attempts += 1
            let view = try makeView(of: specs.map(\.type), below: container, stop)
            defer { _ = try? answer(VIMRequest("DestroyView", on: view), StopFlag()) }
            let traversal = XML.element(
                "selectSet", type: "TraversalSpec",
                [XML.text("type", "ContainerView"), XML.text("path", "view"), XML.flag("skip", false)])
            do {
                return try pages(
                    specs, XML.element("objectSet", [XML.reference("obj", view), XML.flag("skip", true), traversal]),
                    pageSize, container.description, stop
                ) { content in
                    if taken.insert(content.object).inserted { try take(content) }
                }
            } catch let fault as VIMFault {
                let isLost = ["NotAuthenticated", "ManagedObjectNotFound", "InvalidArgument"].contains(fault.type)
                guard isLost, attempts < 3 else {
                    throw fault.error("\(server.authority): properties below \(container)")
                }
            } catch let error as MigrationError where error.code == .unavailable && attempts < 3 {
                try stop.wait(for: .milliseconds(250 << attempts))
            }
        }
    }

    /// The properties of one object.
    func properties(_ paths: [String], of object: ObjectReference, stop: StopFlag) throws -> ObjectContent {
        var found: ObjectContent?
        let objects = XML.element("objectSet", [XML.reference("obj", object), XML.flag("skip", false)])
        do {
            try pages([PropertySpec(object.type, paths)], objects, 1, object.description, stop) { found = $0 }
        } catch let fault as VIMFault {
            throw fault.error("\(server.authority): properties of \(object)")
        }
        guard let found else {
            throw MigrationError(.notFound, "\(server.authority): \(object) is not there or not visible to the account")
        }
        return found
    }

    private func makeView(
        of types: [String], below container: ObjectReference, _ stop: StopFlag
    ) throws -> ObjectReference {
        let request = VIMRequest(
            "CreateContainerView", on: content.viewManager,
            [XML.reference("container", container)] + types.map { XML.text("type", $0) }
                + [XML.flag("recursive", true)])
        guard let view = try call(request, container.description, stop: stop).reference("returnval") else {
            throw MigrationError(.unavailable, "\(server.authority): made no view of \(container)")
        }
        return view
    }

    /// Asks page after page. A property the server is too old for is left out.
    private func pages(
        _ specs: [PropertySpec], _ objects: String, _ pageSize: Int, _ subject: String, _ stop: StopFlag,
        _ take: (ObjectContent) throws -> Void
    ) throws {
        var specs = specs
        var token: String?
        repeat {
            try stop.check()
            let request: VIMRequest
            if let token {
                request = VIMRequest(
                    "ContinueRetrievePropertiesEx", on: content.propertyCollector, [XML.text("token", token)],
                    isRepeatable: false)
            } else {
                request = VIMRequest(
                    "RetrievePropertiesEx", on: content.propertyCollector,
                    [
                        XML.element("specSet", specs.map(\.xml) + [objects]),
                        XML.element("options", [XML.number("maxObjects", pageSize)]),
                    ])
            }
            do {
                let answer = try answer(request, stop, each: "objects") { node in
                    if let content = ObjectContent(node) { try take(content) }
                }
                token = answer["returnval"]?.text("token")
            } catch let fault as VIMFault where fault.type == "InvalidProperty" && token == nil {
                guard let name = fault.detail?.text("name"), Self.drop(name, from: &specs) else { throw fault }
                token = ""
            }
            if token == "" { token = nil } else if token == nil { return }
        } while true
    }

    private static func drop(_ path: String, from specs: inout [PropertySpec]) -> Bool {
        var dropped = false
        for index in specs.indices {
            let before = specs[index].paths.count
            specs[index].paths.removeAll { $0 == path || $0.hasSuffix(".\(path)") }
            dropped = dropped || specs[index].paths.count < before
        }
        return dropped
    }
}
