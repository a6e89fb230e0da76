import Export
import Download
package import HostKit
import MigrationModel
import Synchronization

/// A session with a vCenter or ESXi server over its SOAP API. Blocking; any number of threads, each call over a
/// connection of its own. A session that the server forgot is opened again, once per call.
package final class VIMClient: Sendable {
    private struct State {
        /// "vmware_soap_session=…": as good as the password while the session lasts.
        var cookie: String?
        var logins = 0
        var action = "urn:vim25/6.5"
        var idle: [HTTPTransfer] = []
    }

    package let server: VIMServer
    package let content: ServiceContent
    private let state: Mutex<State>
    /// Held by the thread that logs in.
    private let loginTurn = Mutex(())

    /// Connects and logs in.
    ///
    /// - Throws: `unauthenticated` when the server isn't the trusted one, to which nothing is sent then, or refuses the
    ///   account; `unavailable` when it can't be reached.
    package init(_ server: VIMServer, stop: StopFlag = StopFlag()) throws {
        self.server = server
        var fresh = State()
        let instance = ObjectReference("ServiceInstance", "ServiceInstance")
        let transfer = try HTTPTransfer(server.location("/sdk", name: server.authority), stop)
        let request = VIMRequest("RetrieveServiceContent", on: instance)
        let answer = try Self.withRetries(server, stop) {
            try Self.exchange(request, over: transfer, server.authority, fresh.action, &fresh.cookie)
        }
        guard let node = answer["returnval"] else {
            throw MigrationError(.unavailable, "\(server.authority): answered without a service content")
        }
        content = try ServiceContent(node, server: server.authority)
        fresh.action = content.action
        fresh.idle = [transfer]
        state = Mutex(fresh)
        try login(after: 0, stop)
    }

    /// Ends the session. What fails is of no interest: the server ends it by itself.
    package func close() {
        _ = try? send(VIMRequest("Logout", on: content.sessionManager), StopFlag(), each: nil) { _ in }
    }

    /// Sent to this server only.
    var cookie: String? { state.withLock { $0.cookie } }

    private func login(after logins: Int, _ stop: StopFlag) throws {
        try loginTurn.withLock { _ in
            // Another thread may have been faster.
            guard state.withLock({ $0.logins }) == logins else { return }
            state.withLock { $0.cookie = nil }
            let request = VIMRequest(
                "Login", on: content.sessionManager,
                [XML.text("userName", server.user), XML.text("password", try server.password())])
            do {
                _ = try Self.withRetries(server, stop) { try send(request, stop, each: nil) { _ in } }
            } catch let fault as VIMFault {
                throw fault.error("\(server.authority): login as \(server.user.printable)")
            }
            state.withLock { $0.logins += 1 }
        }
    }

    /// Calls a method and returns its answer's element.
    ///
    /// - Parameters:
    ///   - subject: for messages: "VM web".
    ///   - wanted: name of elements inside the result that `take` gets one by one instead.
    @discardableResult
    func call(
        _ request: VIMRequest, _ subject: String, stop: StopFlag, each wanted: String? = nil,
        _ take: (VIMNode) throws -> Void = { _ in }
    ) throws -> VIMNode {
        do {
            return try answer(request, stop, each: wanted, take)
        } catch let fault as VIMFault {
            throw fault.error("\(server.authority): \(request.method) of \(subject)")
        }
    }

    /// As `call`, but faults are thrown as they are.
    func answer(
        _ request: VIMRequest, _ stop: StopFlag, each wanted: String? = nil,
        _ take: (VIMNode) throws -> Void = { _ in }
    ) throws -> VIMNode {
        let logins = state.withLock { $0.logins }
        func once() throws -> VIMNode {
            var taken = 0
            func send() throws -> VIMNode {
                do {
                    return try self.send(request, stop, each: wanted) {
                        taken += 1
                        try take($0)
                    }
                } catch let interruption as HTTPTransfer.Interrupted where taken > 0 || !request.isRepeatable {
                    throw MigrationError(
                        .unavailable,
                        "\(server.authority): \(request.method) broke off: \(interruption.reason)")
                }
            }
            return try Self.withRetries(server, stop, send)
        }
        do {
            return try once()
        } catch let fault as VIMFault where fault.type == "NotAuthenticated" {
            try login(after: logins, stop)
            return try once()
        }
    }

    private func send(
        _ request: VIMRequest, _ stop: StopFlag, each wanted: String?, _ take: (VIMNode) throws -> Void
    ) throws -> VIMNode {
        var (cookie, action, idle) = state.withLock { ($0.cookie, $0.action, $0.idle.popLast()) }
        let transfer = try idle ?? HTTPTransfer(server.location("/sdk", name: server.authority), stop)
        idle = nil
        transfer.stop = stop
        let before = cookie
        defer {
            state.withLock { state in
                if let cookie, cookie != before { state.cookie = cookie }
                if state.idle.count < 4 { state.idle.append(transfer) }
            }
        }
        return try Self.exchange(request, over: transfer, server.authority, action, &cookie, each: wanted, take)
    }

    private static func exchange(
        _ request: VIMRequest, over transfer: HTTPTransfer, _ name: String, _ action: String, _ cookie: inout String?,
        each wanted: String? = nil, _ take: (VIMNode) throws -> Void = { _ in }
    ) throws -> VIMNode {
        var headers = ["Content-Type: text/xml; charset=utf-8", "SOAPAction: \"\(action)\""]
        if let cookie { headers.append("Cookie: \(cookie)") }
        let response = try transfer.post(request.bytes, headers: headers)
        let isXML = ["text/xml", "application/xml", "application/soap+xml"].contains(response.mediaType)
        guard isXML, response.status == 200 || response.status == 500 else {
            if response.status >= 500 || response.status == 429 {
                throw HTTPTransfer.Interrupted(reason: "the server answered \(response.status)")
            }
            // Of what lasts: nobody is to wait for it.
            throw MigrationError(
                .permissionDenied,
                "\(name): no vSphere API: /sdk answered \(response.status) with "
                    + (response.mediaType.isEmpty ? "nothing" : response.mediaType.printable),
                hint: "check the host's name and port, and that no proxy or login page stands before it")
        }
        if let session = response.cookies.last(where: { $0.hasPrefix("vmware_soap_session=") }),
            session.utf8.allSatisfy({ $0 > 32 && $0 < 127 })
        {
            cookie = session
        }
        return try withoutActuallyEscaping(take) { take in
            let reader = try VIMReader(name: name, each: wanted, take)
            let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
            defer { buffer.deallocate() }
            while true {
                let count = try transfer.read(into: buffer)
                if count == 0 { break }
                try reader.feed(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
            }
            guard let answer = try reader.finish()["Body"]?.children.first else {
                throw MigrationError(.unavailable, "\(name): answered with an empty SOAP body")
            }
            if answer.name == "Fault" { throw VIMFault(soap: answer) }
            return answer
        }
    }

    /// Tries again what broke off, after 0.25 s, then twice as long each time, 8 s in all.
    static func withRetries<Value>(_ server: VIMServer, _ stop: StopFlag, _ body: () throws -> Value) throws -> Value {
        var failures = 0
        while true {
            do { return try body() } catch let interruption as HTTPTransfer.Interrupted {
                guard failures < 5 else {
                    throw MigrationError(
                        .unavailable, "\(server.authority): \(interruption.reason)",
                        hint: "look at the server, then try again")
                }
                server.willRetry("\(server.authority): \(interruption.reason); it is asked again")
                try stop.wait(for: .milliseconds(250 << failures))
                failures += 1
            }
        }
    }
}
