import Download
import Glibc
import HostKit
import Synchronization

@testable import VSphere

/// A server of the API on loopback with a few canned objects, for what a real one can't be made to do at a given moment.
/// Speaks plain HTTP and keeps no connection open.
final class FakeVCenter: Sendable {
    /// What goes wrong with a call.
    enum Trouble {
        /// The session is forgotten, and with it every page of a collector.
        case expired
        /// The connection ends without an answer, or with half of it.
        case cut, cutInside
        /// A login page.
        case page
        /// The fault's type and its properties.
        case fault(String, String)
        /// What the response holds.
        case answer(String)
    }

    private struct State {
        var session = 0
        var calls: [String: Int] = [:]
    }

    let authority: String
    private let listener: Int32
    private let state = Mutex(State())
    private let places: [String]
    private let machines: [String]
    private let pageSize: Int
    private let trouble: @Sendable (_ method: String, _ call: Int, _ body: String) -> Trouble?

    /// - Parameters:
    ///   - places, machines: `objects` elements, of everything but VMs and of VMs.
    ///   - trouble: asked at each call with the method's name, how often it was called (from 1), and the request.
    init(
        places: [String] = [], machines: [String], pageSize: Int = 100,
        trouble: @escaping @Sendable (String, Int, String) -> Trouble? = { _, _, _ in nil }
    ) throws {
        (self.places, self.machines, self.pageSize, self.trouble) = (places, machines, pageSize, trouble)
        let listener = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        var length = socklen_t(MemoryLayout<sockaddr_in>.size)
        let port: UInt16? = withUnsafeMutablePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                guard bind(listener, address, length) == 0, listen(listener, 16) == 0,
                    getsockname(listener, address, &length) == 0
                else { return nil }
                return UInt16(bigEndian: pointer.pointee.sin_port)
            }
        }
        guard let port else { throw systemError("listen on", "127.0.0.1") }
        self.listener = listener
        authority = "127.0.0.1:\(port)"
        // Holds no reference: the socket's end is the thread's.
        spawnThread("fake-vcenter") { [weak self] in
            while true {
                let connection = accept(listener, nil, nil)
                if connection < 0 && errno == EINTR { continue }
                guard connection >= 0 else { return }
                self?.serve(connection)
                close(connection)
            }
        }
    }

    deinit {
        shutdown(listener, Int32(SHUT_RDWR))
        close(listener)
    }

    var server: VIMServer {
        var server = VIMServer(authority: authority, user: "me", trust: .system) { "geheim" }
        server.scheme = "http"
        return server
    }

    func client() throws -> VIMClient { try VIMClient(server) }

    /// How often a method was called.
    func calls(_ method: String) -> Int { state.withLock { $0.calls[method] ?? 0 } }

    private func serve(_ connection: Int32) {
        var bytes: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 64 << 10)
        var text = ""
        while true {
            let count = read(connection, &buffer, buffer.count)
            guard count > 0 else { return }
            bytes += buffer[..<count]
            // TLS, which it doesn't speak.
            if bytes[0] == 0x16 { return Self.sendPage(400, connection) }
            text = String(decoding: bytes, as: UTF8.self)
            if text.contains("</soapenv:Envelope>") { break }
        }
        guard let body = text.firstRange(of: "<soapenv:Body><") else { return }
        let method = String(text[body.upperBound...].prefix { $0 != " " })
        let count = state.withLock { state in
            state.calls[method, default: 0] += 1
            return state.calls[method] ?? 0
        }
        var (status, answer, cut) = (200, "", false)
        switch trouble(method, count, text) {
        case .cut: return
        case .page: return Self.sendPage(200, connection)
        case .expired:
            state.withLock { $0.session += 1 }
            (status, answer) = (500, Self.fault("NotAuthenticated", ""))
        case .fault(let type, let detail): (status, answer) = (500, Self.fault(type, detail))
        case .answer(let content):
            answer = "<\(method)Response xmlns=\"urn:vim25\">\(content)</\(method)Response>"
        case .cutInside:
            cut = true
            fallthrough
        case nil:
            (status, answer) = self.answer(method, text)
        }
        let xml = """
            <?xml version="1.0" encoding="UTF-8"?>
            <soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" \
            xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>\(answer)</soapenv:Body></soapenv:Envelope>
            """
        let cookie = method == "Login" ? "Set-Cookie: vmware_soap_session=\(session); Path=/\r\n" : ""
        let head =
            "HTTP/1.1 \(status) X\r\nContent-Type: text/xml\r\nConnection: close\r\n\(cookie)"
            + "Content-Length: \(xml.utf8.count)\r\n\r\n"
        let whole = Array((head + xml).utf8)
        // Right before the last object's end.
        let end = cut ? whole.count - 160 : whole.count
        var sent = 0
        while sent < end {
            let count = whole[sent..<end].withUnsafeBytes {
                send(connection, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else { return }
            sent += count
        }
    }

    private static func sendPage(_ status: Int, _ connection: Int32) {
        let page = Array("HTTP/1.1 \(status) X\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<html>".utf8)
        _ = page.withUnsafeBytes { send(connection, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
    }

    private var session: String { "s\(state.withLock { $0.session })" }

    private func answer(_ method: String, _ request: String) -> (Int, String) {
        if !["RetrieveServiceContent", "Login"].contains(method), !request.contains("vmware_soap_session=\(session)") {
            return (500, Self.fault("NotAuthenticated", ""))
        }
        func response(_ content: String) -> (Int, String) {
            (200, "<\(method)Response xmlns=\"urn:vim25\">\(content)</\(method)Response>")
        }
        switch method {
        case "RetrieveServiceContent":
            return response(
                """
                <returnval><rootFolder type="Folder">group-d1</rootFolder>\
                <propertyCollector type="PropertyCollector">pc</propertyCollector><viewManager type="ViewManager">vm</viewManager>\
                <about><fullName>Fake</fullName><apiType>HostAgent</apiType><apiVersion>8.0.1.0</apiVersion></about>\
                <sessionManager type="SessionManager">sm</sessionManager></returnval>
                """)
        case "CreateContainerView": return response("<returnval type=\"ContainerView\">view</returnval>")
        case "CreateSnapshot_Task", "RemoveSnapshot_Task": return response("<returnval type=\"Task\">task</returnval>")
        case "RetrievePropertiesEx" where request.contains("<type>Task</type>"):
            let info = "<val><state>success</state><result type=\"VirtualMachineSnapshot\">snapshot-1</result></val>"
            return response("<returnval>\(objectXML("Task", "task", ["info": info]))</returnval>")
        case "RetrievePropertiesEx":
            let isMachines = request.contains("<type>VirtualMachine</type>")
            return response(page(isMachines ? machines : places, isMachines, from: 0))
        case "ContinueRetrievePropertiesEx":
            let token = request.firstRange(of: "<token>").map { request[$0.upperBound...].prefix { $0 != "<" } } ?? ""
            let parts = token.split(separator: ":")
            // As a vCenter: another session's token is none.
            guard parts.count == 3, parts[0] == session, let start = Int(parts[2]) else {
                return (500, Self.fault("InvalidArgument", "<invalidProperty>token</invalidProperty>"))
            }
            let isMachines = parts[1] == "true"
            return response(page(isMachines ? machines : places, isMachines, from: start))
        default: return response("")
        }
    }

    private func page(_ objects: [String], _ isMachines: Bool, from start: Int) -> String {
        guard !objects.isEmpty else { return "" }
        let end = min(objects.count, start + pageSize)
        let token = end < objects.count ? "<token>\(session):\(isMachines):\(end)</token>" : ""
        return "<returnval>\(token)\(objects[start..<end].joined())</returnval>"
    }

    private static func fault(_ type: String, _ detail: String) -> String {
        """
        <soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>It is \(type).</faultstring><detail>\
        <\(type)Fault xsi:type="\(type)">\(detail)</\(type)Fault></detail></soapenv:Fault>
        """
    }
}

/// An object of the property collector's answer.
func objectXML(_ type: String, _ id: String, _ properties: [String: String], hidden: [String] = []) -> String {
    let sets = properties.sorted { $0.key < $1.key }.map { "<propSet><name>\($0.key)</name>\($0.value)</propSet>" }
    let missing = hidden.map {
        "<missingSet><path>\($0)</path><fault><fault xsi:type=\"NoPermission\"/></fault></missingSet>"
    }
    return "<objects><obj type=\"\(type)\">\(id)</obj>\((sets + missing).joined())</objects>"
}
