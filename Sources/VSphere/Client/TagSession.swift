import Download
import Export
import FlotillaProtocol
import FoundationEssentials
import HostKit
import MigrationModel

/// A session with vCenter's REST API, where tags live. Blocking, one thread at a time.
final class TagSession {
    /// Where the API is served, and how.
    enum Style {
        /// vSphere 6.5 to 8: each answer wrapped, ids and actions with marks.
        case rest
        /// vSphere 7.0.2 and later.
        case api

        /// In the order of a server's liking.
        ///
        /// - Parameter version: of its API, "8.0.1.0".
        static func order(version: String) -> [Style] {
            let numbers = version.split(separator: ".").map { Int($0) ?? 0 }
            return numbers.lexicographicallyPrecedes([7, 0, 2]) ? [.rest, .api] : [.api, .rest]
        }

        var session: String { self == .rest ? "/rest/com/vmware/cis/session" : "/api/session" }
        var tagging: String { self == .rest ? "/rest/com/vmware/cis/tagging" : "/api/cis/tagging" }
        var idMark: String { self == .rest ? "id:" : "" }
        var actionMark: String { self == .rest ? "~" : "" }
    }

    private struct Answer<Value: Decodable>: Decodable {
        /// Left out where it is empty.
        var value: Value?
    }

    private struct Object: Codable {
        var id: String
        var type: String
    }

    private struct Attached: Decodable {
        var tagId: String
        var objectIds: [Object]?
    }

    private struct TagModel: Decodable {
        var name: String
        var categoryId: String
    }

    private struct CategoryModel: Decodable { var name: String }
    private struct TagList: Encodable { var tagIds: [String] }
    private struct OfObject: Encodable { var objectId: Object }

    /// Far above what a page of ids takes.
    private static let answerLimit = 64 << 20
    private static let tagsPerRequest = 200

    private let server: VIMServer
    private let stop: StopFlag
    private let transfer: HTTPTransfer
    private var style = Style.rest
    private var token = ""
    private var tags: [String: Tag] = [:]
    private var categories: [String: String] = [:]

    /// - Parameter version: of the server's API; decides where it is asked first.
    init(_ server: VIMServer, version: String, stop: StopFlag) throws {
        self.server = server
        self.stop = stop
        transfer = try HTTPTransfer(server.location("/", name: server.authority), stop)
        let styles = Style.order(version: version)
        do { try open(styles[0]) } catch let error as MigrationError where error.code == .notFound {
            try open(styles[1])
        }
    }

    private func open(_ style: Style) throws {
        self.style = style
        let account = Data("\(server.user):\(try server.password())".utf8).base64EncodedString()
        guard let token: String = try ask("POST", style.session, header: "Authorization: Basic \(account)"),
            !token.isEmpty, token.utf8.allSatisfy({ $0 > 32 && $0 < 127 })
        else { throw failure("opened no session") }
        self.token = token
    }

    /// What fails is of no interest: the server ends the session by itself.
    func close() { _ = try? ask("DELETE", style.session) as String? }

    /// The tags of all VMs that have some, by managed object id.
    func all() throws -> [String: [Tag]] {
        let ids: [String] = try ask("GET", "\(style.tagging)/tag") ?? []
        var found: [String: [Tag]] = [:]
        for start in stride(from: 0, to: ids.count, by: Self.tagsPerRequest) {
            let part = Array(ids[start..<min(start + Self.tagsPerRequest, ids.count)])
            let attached: [Attached] = try list("list-attached-objects-on-tags", TagList(tagIds: part)) ?? []
            for entry in attached {
                for object in entry.objectIds ?? [] where object.type == "VirtualMachine" {
                    found[object.id, default: []].append(try tag(entry.tagId))
                }
            }
        }
        return found.mapValues(Self.sorted)
    }

    func ofMachine(_ id: String) throws -> [Tag] {
        let body = OfObject(objectId: Object(id: id, type: "VirtualMachine"))
        let ids: [String] = try list("list-attached-tags", body) ?? []
        return Self.sorted(try ids.map(tag))
    }

    private static func sorted(_ tags: [Tag]) -> [Tag] {
        tags.sorted { ($0.category, $0.name) < ($1.category, $1.name) }
    }

    private func tag(_ id: String) throws -> Tag {
        if let known = tags[id] { return known }
        guard let model: TagModel = try ask("GET", path("tag", id)) else {
            throw failure("knows no tag \(id.printable)")
        }
        var tag = Tag()
        tag.name = model.name
        tag.category = try category(model.categoryId)
        tags[id] = tag
        return tag
    }

    private func category(_ id: String) throws -> String {
        if let known = categories[id] { return known }
        guard let model: CategoryModel = try ask("GET", path("category", id)) else {
            throw failure("knows no tag category \(id.printable)")
        }
        categories[id] = model.name
        return model.name
    }

    private func path(_ kind: String, _ id: String) -> String {
        "\(style.tagging)/\(kind)/\(style.idMark)\(VSphereURL.encoded(id, besides: ":"))"
    }

    private func list<Value: Decodable>(_ action: String, _ body: some Encodable) throws -> Value? {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        let bytes = Array(try encoder.encode(body))
        return try ask("POST", "\(style.tagging)/tag-association?\(style.actionMark)action=\(action)", bytes)
    }

    /// Every request may be repeated: none changes anything but the sessions.
    private func ask<Value: Decodable>(
        _ method: String, _ path: String, _ body: [UInt8] = [], header: String? = nil
    ) throws -> Value? {
        try VIMClient.withRetries(server, stop) {
            let headers = [
                "Content-Type: application/json", "Accept: application/json",
                header ?? "vmware-api-session-id: \(token)",
            ]
            let response = try transfer.send(method, to: server.url(path), body, headers: headers)
            if response.status >= 500 || response.status == 429 {
                throw HTTPTransfer.Interrupted(reason: "its API for tags answered \(response.status)")
            }
            let bytes = try self.body()
            guard [200, 201, 204].contains(response.status) else {
                throw failure(
                    "answered \(response.status) to \(method) \(path.prefix { $0 != "?" })",
                    response.status == 404 ? .notFound : .unavailable)
            }
            if bytes.isEmpty { return nil }
            let decoder = JSONDecoder()
            decoder.keyDecodingStrategy = .convertFromSnakeCase
            do {
                if style == .api { return try decoder.decode(Value?.self, from: Data(bytes)) }
                return try decoder.decode(Answer<Value>.self, from: Data(bytes)).value
            } catch is DecodingError {
                throw failure("answered \(method) \(path.prefix { $0 != "?" }) with something else than it documents")
            }
        }
    }

    private func body() throws -> [UInt8] {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 16)
        defer { buffer.deallocate() }
        var bytes: [UInt8] = []
        while true {
            let count = try transfer.read(into: buffer)
            if count == 0 { return bytes }
            guard bytes.count + count <= Self.answerLimit else { throw failure("answered with more than 64 MiB") }
            bytes.append(contentsOf: UnsafeRawBufferPointer(rebasing: buffer[..<count]))
        }
    }

    private func failure(_ what: String, _ code: MigrationError.Code = .unavailable) -> MigrationError {
        MigrationError(
            code, "\(server.authority): its API for tags \(what)",
            hint: "look whether the account may read tags, and whether /api or /rest is served")
    }
}

/// Tags of the VMs that are captured.
enum VMTags {
    /// By managed object id.
    case known([String: [Tag]])
    case unknown(MigrationError)
}
