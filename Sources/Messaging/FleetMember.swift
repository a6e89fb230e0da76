package import HostKit
package import MigrationModel
import Synchronization

/// The coordinator or a host's worker: the name it goes by, the key it signs with, and the keys it believes.
///
/// Every message between members is signed: a broker account, or a hand on a queue, is not enough to make a host do
/// something. What is signed is in `Message.signedBytes`; `protocol/amqp.md` says it in words.
package struct FleetMember: Sendable {
    /// The coordinator's name. No host can have it: host names become queue names after a dot.
    package static let coordinator = "coordinator"

    package let name: String
    private let key: SigningKey
    private let keyID: String
    private let ring: KeyRing
    private let roots = VerifiedRoots()

    /// How far the sender's clock may be ahead of ours.
    package static let clockTolerance = Duration.seconds(60)

    fileprivate enum Header {
        static let issuer = "flotilla-issuer"
        static let audience = "flotilla-audience"
        static let keyID = "flotilla-key-id"
        static let issued = "flotilla-issued-unix-ms"
        static let expires = "flotilla-expires-unix-ms"
    }

    package init(name: String, key: SigningKey, believes ring: KeyRing) {
        self.name = name
        self.key = key
        keyID = key.publicKey.id
        self.ring = ring
    }

    package static let hostNameRule =
        "names have 1 to 63 letters, digits, '-' and '.', begin and end with a letter or digit, and aren't '\(coordinator)'"

    /// Whether a host can go by this name: it becomes part of queue names, routing keys and file names.
    package static func isHostName(_ name: String) -> Bool {
        func isAlphanumeric(_ byte: UInt8) -> Bool {
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"):
                true
            default: false
            }
        }
        let bytes = Array(name.utf8)
        guard (1...63).contains(bytes.count), name != coordinator, let first = bytes.first, let last = bytes.last else {
            return false
        }
        return isAlphanumeric(first) && isAlphanumeric(last)
            && bytes.allSatisfy { isAlphanumeric($0) || $0 == UInt8(ascii: "-") || $0 == UInt8(ascii: ".") }
    }

    /// Whom it believes: for the coordinator, the hosts of its fleet. Reads the keys' folder again if it is due.
    package func believed() throws -> [String] { try ring.owners() }

    /// Whether there is a key by which the other could be believed.
    package func knows(_ other: String) -> Bool { ring.hasKey(of: other) }

    /// A coordinator and the worker of one host with keys made for this process, who know each other.
    package static func pair(host: String) -> (coordinator: FleetMember, worker: FleetMember) {
        let (ours, theirs) = (SigningKey(), SigningKey())
        return (
            FleetMember(name: coordinator, key: ours, believes: KeyRing([host: [theirs.publicKey]])),
            FleetMember(name: host, key: theirs, believes: KeyRing([coordinator: [ours.publicKey]]))
        )
    }

    /// Signs the message as it is; nothing of it may change any more.
    ///
    /// - Parameter validity: after it the audience refuses the message.
    package func sign(_ message: inout Message, for audience: String, validity: Duration, now: Moment = .now) {
        address(&message, to: audience, validity, now)
        message.headers[Message.signatureHeader] = .bytes(key.sign(message.signedBytes))
    }

    /// Signs messages to one audience at the price of one: what is signed is the root of a tree of them.
    package func sign(_ messages: inout [Message], for audience: String, validity: Duration, now: Moment = .now) {
        guard messages.count > 1 else {
            for index in messages.indices { sign(&messages[index], for: audience, validity: validity, now: now) }
            return
        }
        for index in messages.indices { address(&messages[index], to: audience, validity, now) }
        let tree = MessageTree(messages.map(\.signedBytes))
        let signature = key.sign(Message.signedBytes(root: tree.root))
        for index in messages.indices {
            messages[index].headers[Message.pathHeader] = .bytes(tree.path(of: index))
            messages[index].headers[Message.signatureHeader] = .bytes(signature)
        }
    }

    private func address(_ message: inout Message, to audience: String, _ validity: Duration, _ now: Moment) {
        message.headers[Header.issuer] = .string(name)
        message.headers[Header.audience] = .string(audience)
        message.headers[Header.keyID] = .string(keyID)
        message.headers[Header.issued] = .integer(now.milliseconds)
        message.headers[Header.expires] = .integer((now + validity).milliseconds)
    }

    /// Returns who signed the message. Throws `invalidArgument` for one that is too large, `unauthenticated` for one that
    /// is unsigned, forged or signed with a key not believed, `permissionDenied` for one addressed to somebody else, and
    /// `deadlineExceeded` for one that came too late; only the last is thrown of a message that is otherwise good.
    package func verify(_ message: Message, now: Moment = .now) throws -> String {
        let (issuer, issued, expires) = try signature(of: message)
        guard message.headers[Header.audience]?.string == name else {
            throw MigrationError(
                .permissionDenied,
                "it is addressed to \(message.headers[Header.audience]?.string ?? "nobody"), this is \(name)")
        }
        guard issued <= now + Self.clockTolerance else {
            throw MigrationError(
                .unauthenticated, "it was signed \((issued.milliseconds - now.milliseconds) / 1000) s in the future",
                hint: "set the clocks of \(issuer) and \(name) by NTP")
        }
        guard now <= expires else {
            throw MigrationError(
                .deadlineExceeded, "its validity ended \((now.milliseconds - expires.milliseconds) / 1000) s ago")
        }
        return issuer
    }

    /// Who signed the message and when, by its own clock, whether or not it can be taken. Throws as `verify` does.
    package func signature(of message: Message) throws -> (issuer: String, issued: Moment, expires: Moment) {
        try message.requireSize()
        guard case .bytes(let signature)? = message.headers[Message.signatureHeader],
            let keyID = message.headers[Header.keyID]?.string,
            let issuer = message.headers[Header.issuer]?.string,
            let issued = message.issuedAt, let expires = message.moment(Header.expires)
        else { throw MigrationError(.unauthenticated, "it is not signed") }
        guard let key = try ring.key(keyID, of: issuer) else {
            throw MigrationError(
                .unauthenticated, "it is signed by \(issuer) with key \(keyID), which \(name) does not believe",
                hint: name == Self.coordinator
                    ? "enroll the host (again) with: flotilla host enroll; one that was to be forgotten: stop its worker"
                    : "take the coordinator's keys with: flotilla worker enroll --host \(name), "
                        + "flotilla host enroll there, flotilla worker enroll --answer")
        }
        guard verifies(signature, of: message, by: key) else {
            throw MigrationError(.unauthenticated, "its signature by \(issuer)'s key \(keyID) is wrong")
        }
        return (issuer, issued, expires)
    }

    private func verifies(_ signature: [UInt8], of message: Message, by key: PublicKey) -> Bool {
        guard let path = message.headers[Message.pathHeader] else {
            return key.verifies(signature, of: message.signedBytes)
        }
        guard case .bytes(let path) = path, let root = MessageTree.root(of: message.signedBytes, along: path) else {
            return false
        }
        return roots.verify(.init(key: key, root: root, signature: signature)) {
            key.verifies(signature, of: Message.signedBytes(root: root))
        }
    }
}

/// The signed roots that were verified last: the messages of a tree come one after another.
private final class VerifiedRoots: Sendable {
    struct Signed: Equatable {
        let key: PublicKey
        let root: [UInt8]
        let signature: [UInt8]
    }

    private static let limit = 32
    private let verified = Mutex<[Signed]>([])

    func verify(_ signed: Signed, _ verifies: () -> Bool) -> Bool {
        if verified.withLock({ $0.contains(signed) }) { return true }
        guard verifies() else { return false }
        verified.withLock { $0 = $0.suffix(Self.limit - 1) + [signed] }
        return true
    }
}

extension Message {
    package static let signatureHeader = "flotilla-signature-bin"
    /// A message's way to the root that was signed, where it was signed together with others.
    package static let pathHeader = "flotilla-signature-path-bin"

    /// When it was signed, by the clock of who did; to be believed once the signature is.
    package var issuedAt: Moment? { moment(FleetMember.Header.issued) }

    /// Nil for what no clock shows, and what could not be reckoned with.
    fileprivate func moment(_ header: String) -> Moment? {
        guard let milliseconds = headers[header]?.integer, (0...1 << 53).contains(milliseconds) else { return nil }
        return Moment(milliseconds: milliseconds)
    }

    /// The bytes a signature of several messages is made over.
    fileprivate static func signedBytes(root: [UInt8]) -> [UInt8] { Array("flotilla-signature-tree-v1".utf8) + root }

    /// The bytes a signature is made over: the text `flotilla-signature-v1`, then type, content-type, correlation-id and
    /// message-id, then every header but the signature, its path and those a broker adds (`x-…`), sorted by name, as the name, one
    /// letter for its kind (`s`, `i`, `b`) with its value (text, decimal digits, bytes), and at last the body; each
    /// preceded by its length in four bytes, big-endian.
    package var signedBytes: [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(body.count + 1024)
        func add(_ field: some Collection<UInt8>, kind: Character? = nil) {
            let length = field.count + (kind == nil ? 0 : 1)
            withUnsafeBytes(of: UInt32(length).bigEndian) { bytes.append(contentsOf: $0) }
            if let kind { bytes.append(contentsOf: kind.utf8) }
            bytes.append(contentsOf: field)
        }
        for text in ["flotilla-signature-v1", type, contentType, correlationID, messageID] { add(text.utf8) }
        let covered = headers.filter { name, _ in
            name != Self.signatureHeader && name != Self.pathHeader && !name.hasPrefix("x-")
        }
        for (name, value) in covered.sorted(by: { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }) {
            add(name.utf8)
            switch value {
            case .string(let text): add(text.utf8, kind: "s")
            case .integer(let number): add(String(number).utf8, kind: "i")
            case .bytes(let content): add(content, kind: "b")
            }
        }
        add(body)
        return bytes
    }
}
