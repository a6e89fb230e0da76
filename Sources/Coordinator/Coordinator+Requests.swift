import FlotillaProtocol
import HostKit
import Logging
import Messaging
import MigrationModel
import SwiftProtobuf
import Synchronization

/// Other programs on the bus: what they ask for, and what they are told.
extension Coordinator {
    /// Migrations somebody asks for on the requests' queue, as `SubmitMigration` or `SubmitMigrations`, in protobuf or
    /// JSON. The answer is a notification whose subject is the request's message-id.
    func serve(_ requests: Subscription) async throws {
        for await delivery in requests.deliveries {
            let message = delivery.message
            do {
                let wanted = try await accept(message)
                let mark = hex(
                    Digest.hash(.sha256, Array("\(message.userID)\0\(message.messageID)\0".utf8) + message.body))
                let isCopy = delivery.redeliveries > 0
                try await decide { transitions in
                    // The broker's copy of what was heard before must not begin anew what somebody cancelled since.
                    var ids = isCopy ? try transitions.store.migrations(ofRequest: mark) ?? [] : []
                    if ids.isEmpty {
                        ids = try wanted.map { try transitions.submit($0).id }
                        try transitions.store.note(request: mark, ids)
                    }
                    try transitions.notify(.answer(to: message.messageID, .success(ids), at: transitions.now))
                }
                await delivery.settle(.ack)
            } catch  where Task.isCancelled || error.isOfTheStore {
                // This process ends; what is not settled comes again, to the next one.
                throw error
            } catch {
                let error = error as? MigrationError ?? MigrationError(.invalidArgument, "\(error)")
                // Whoever may not ask is not answered, and without an id nobody could tell what the answer is to.
                if error.code != .permissionDenied, !message.messageID.isEmpty {
                    try await decide {
                        try $0.notify(.answer(to: message.messageID, .failure(error), at: $0.now))
                    }
                }
                try await reject(delivery, from: settings.names.requests, "\(error)")
            }
        }
    }

    /// Throws what is wrong with a request.
    private func accept(_ message: Messaging.Message) async throws -> [SubmitMigrationRequest] {
        // The broker has verified the user; whoever may write to the exchange besides is not heard.
        guard settings.requesters.contains(message.userID) else {
            throw MigrationError(
                .permissionDenied,
                message.userID.isEmpty
                    ? "the request names no user: set the property user-id"
                    : "\(message.userID) may not ask for migrations",
                hint: "the coordinator's configuration lists in 'requesters' who may")
        }
        try message.requireSize()
        guard !message.messageID.isEmpty, message.messageID.utf8.count <= 128 else {
            throw MigrationError(.invalidArgument, "a request needs a message-id of at most 128 bytes to be answered")
        }
        let requests: [SubmitMigrationRequest]
        do {
            switch message.type {
            case "/flotilla.v1.CoordinatorService/SubmitMigration": requests = [try decode(message)]
            case "/flotilla.v1.CoordinatorService/SubmitMigrations":
                requests = (try decode(message) as SubmitMigrationsRequest).migrations
            default:
                throw MigrationError(.unimplemented, "'\(message.type)' can't be asked for on this queue")
            }
        } catch let error as MigrationError {
            throw error
        } catch {
            throw MigrationError(
                .invalidArgument, "the request's body can't be read as \(message.contentType): \(error)")
        }
        for request in requests {
            try request.validate()
            try await requireHost(request.host)
        }
        return requests
    }

    private func decode<Request: SwiftProtobuf.Message>(_ message: Messaging.Message) throws -> Request {
        switch message.contentType {
        case "application/json": try Request(jsonUTF8Bytes: message.body)
        case TaskCall.contentType, "application/protobuf": try Request(serializedBytes: message.body)
        default:
            throw MigrationError(
                .invalidArgument, "content-type '\(message.contentType)' is neither application/json nor protobuf")
        }
    }

    /// Tells other programs what they are to know in its order, each thing at least once, but for a listener whose queue
    /// takes it in none of several tries: nobody else may wait for that for ever. From then on what is told under the same
    /// key, as long as none of it is taken, is tried once and waited for by nobody.
    func publishNotifications() async throws {
        let patience = 3
        let ended = EndedNotifications()
        var sending: Set<String> = []
        var stalled: Set<String> = []
        var tries = (id: "", count: 0)
        notificationContinuation.yield()
        try await withThrowingDiscardingTaskGroup { group in
            for await _ in notificationSignal {
                var gone: [String] = []
                var isPausing = false
                for (row, error) in ended.takeAll() {
                    sending.remove(row.id)
                    // While there is no broker no listener is to blame.
                    let isCut = error?.code == .unavailable && !isConnected
                    if tries.id != row.id { tries = (row.id, 0) }
                    if !isCut { tries.count += 1 }
                    let isStalled = error.map { [.unavailable, .resourceExhausted].contains($0.code) } ?? false
                    if let error, isStalled, isCut || tries.count < patience && !stalled.contains(row.routingKey) {
                        logger.warning("notification not sent yet", metadata: ["error": "\(error)"])
                        isPausing = true
                        continue
                    }
                    gone.append(row.id)
                    // Nobody listens, or one who does takes no more: neither may hold up the others.
                    guard let error, error.code != .notFound else {
                        stalled.remove(row.routingKey)
                        continue
                    }
                    if isStalled { stalled.insert(row.routingKey) }
                    logger.error(
                        "notification given up",
                        metadata: ["id": "\(row.id)", "type": "\(row.routingKey)", "error": "\(error)"])
                }
                if isPausing { try await Task.sleep(for: settings.tick) }
                let rows = try await store.write { [gone, limit = stalled.isEmpty ? 1 : 256] store in
                    for id in gone { try store.removeNotification(id) }
                    return try store.notifications(limit: limit)
                }
                for row in rows {
                    // Started at once, so that they reach the bus in this order.
                    if sending.insert(row.id).inserted {
                        group.addImmediateTask {
                            ended.add(row, await self.send(row))
                            self.notificationContinuation.yield()
                        }
                    }
                    if !stalled.contains(row.routingKey) { break }
                }
            }
        }
    }

    /// Returns the reason for which it could not be sent.
    private func send(_ row: NotificationRecord) async -> MigrationError? {
        var message = Message(exchange: settings.names.notifications, routingKey: row.routingKey, body: row.body)
        message.type = "flotilla.\(row.routingKey)"
        message.messageID = row.id
        message.contentType = "application/cloudevents+json; charset=utf-8"
        do {
            try await bus.publish(message)
            return nil
        } catch {
            return error as? MigrationError ?? MigrationError(.unavailable, "\(error)")
        }
    }

    private var isConnected: Bool {
        bus.status.connections.allSatisfy { if case .connected = $0.state { true } else { false } }
    }
}

/// Those that are not on their way any more, and why not, where it is because they could not be sent.
private final class EndedNotifications: Sendable {
    private let state = Mutex<[(row: NotificationRecord, error: MigrationError?)]>([])

    func add(_ row: NotificationRecord, _ error: MigrationError?) { state.withLock { $0.append((row, error)) } }

    func takeAll() -> [(row: NotificationRecord, error: MigrationError?)] {
        state.withLock { state in
            defer { state = [] }
            return state
        }
    }
}

extension SubmitMigrationRequest {
    var withoutDeadline: SubmitMigrationRequest {
        var request = self
        request.clearDeadline()
        return request
    }

    func validate() throws {
        guard !sourceURL.isEmpty, !host.isEmpty, !pool.isEmpty, ["qcow2", "raw"].contains(format) else {
            throw MigrationError(.invalidArgument, "a migration needs source_url, host, pool, and format qcow2 or raw")
        }
        guard !sourceURL.holdsPassword else {
            throw MigrationError(
                .invalidArgument, "source_url holds a password, which everybody would see who may see the migration",
                hint: "leave it out: workers read it from the 'password-file' of the server in their configuration")
        }
        // Others can't be told of in protobuf's JSON.
        guard !hasDeadline || deadline.isInRange else {
            throw MigrationError(
                .invalidArgument, "the deadline, \(deadline.seconds) s and \(deadline.nanos) ns, is out of range",
                hint: "it has to be in the years 1 to 9999, with 0 to 999999999 ns")
        }
    }
}

extension String {
    /// Whether this URL names a user with a password or, where workers take no user's name, a user. One that can't be
    /// read for sure, as with a `/` in the password, counts as well.
    fileprivate var holdsPassword: Bool {
        guard let separator = firstRange(of: "://") else { return false }
        let rest = self[separator.upperBound...]
        let authority = rest.prefix { !"/?#".contains($0) }
        if let at = authority.lastIndex(of: "@") {
            return authority[..<at].contains(":") || !self[..<separator.lowerBound].lowercased().hasPrefix("vsphere")
        }
        guard let colon = authority.lastIndex(of: ":"), !authority.hasSuffix("]") else { return false }
        return !authority[authority.index(after: colon)...].allSatisfy(\.isNumber) && rest.contains("@")
    }
}

extension Google_Protobuf_Timestamp {
    fileprivate var isInRange: Bool {
        (-62_135_596_800...253_402_300_799).contains(seconds) && (0...999_999_999).contains(nanos)
    }
}
