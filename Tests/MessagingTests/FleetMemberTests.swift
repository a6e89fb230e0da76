import Glibc
import HostKit
import Messaging
import MigrationModel
import TestKit
import Testing

@Suite struct FleetMemberTests {
    /// RFC 8032, 7.1, tests 1 to 3.
    @Test(arguments: [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ])
    func ed25519(_ seed: String, _ publicKey: String, _ message: String, _ signature: String) throws {
        let key = try SigningKey(seed: bytes(seed))
        #expect(hex(key.publicKey.bytes) == publicKey)
        #expect(hex(key.sign(bytes(message))) == signature)
        #expect(key.publicKey.verifies(bytes(signature), of: bytes(message)))
        #expect(!key.publicKey.verifies(bytes(signature), of: bytes(message) + [0]))
        #expect(!key.publicKey.verifies([], of: bytes(message)))
    }

    @Test func keysSurviveTheirFiles() throws {
        let folder = try TemporaryFolder()
        let (private_, public_) = ("\(folder.path)/key.pem", "\(folder.path)/key.pub.pem")
        let key = SigningKey()
        try Files.writeAtomically(key.pem, to: private_)
        try Files.writeAtomically(key.publicKey.pem, to: public_, mode: 0o644)
        #expect(try SigningKey(path: private_).sign([1, 2]) == key.sign([1, 2]))
        #expect(try PublicKey(path: public_) == key.publicKey)
        #expect(failure { try SigningKey(path: public_) }?.code == .permissionDenied)
        chmod(public_, 0o600)
        #expect(failure { try SigningKey(path: public_) }?.code == .invalidArgument)
        #expect(failure { try PublicKey(path: private_) }?.code == .invalidArgument)
        chmod(private_, 0o640)
        #expect(failure { try SigningKey(path: private_) }?.code == .permissionDenied)
    }

    /// Old key and new one lie side by side; a removed key is believed for at most a minute more.
    @Test func rotation() async throws {
        let folder = try TemporaryFolder("coordinator")
        let (old, new) = (SigningKey(), SigningKey())
        func publish(_ key: SigningKey, _ name: String) throws {
            try Files.writeAtomically(key.publicKey.pem, to: "\(folder.path)/coordinator/\(name).pem", mode: 0o644)
        }
        try publish(old, "2025")
        let ring = try KeyRing(folder: folder.path)
        let worker = FleetMember(name: "kvm1", key: SigningKey(), believes: ring)
        func accepts(_ key: SigningKey) -> Bool {
            let sender = FleetMember(name: FleetMember.coordinator, key: key, believes: KeyRing([:]))
            var message = Message(exchange: "", routingKey: "", body: [1])
            sender.sign(&message, for: "kvm1", validity: .seconds(60))
            return (try? worker.verify(message)) == FleetMember.coordinator
        }
        #expect(accepts(old))
        #expect(!accepts(new))
        try publish(new, "2026")
        #expect(try await eventually { accepts(new) ? true : nil } == true)
        #expect(accepts(old))
        #expect(try ring.owners() == ["coordinator"])
    }

    /// A file that is no key is in the way of its owner's new keys, of nothing that was believed before.
    @Test func damagedFileKeepsWhatIsKnown() async throws {
        let folder = try TemporaryFolder("coordinator")
        try Files.createDirectories("\(folder.path)/kvm1")
        let (key, other, new) = (SigningKey(), SigningKey(), SigningKey())
        try Files.writeAtomically(key.publicKey.pem, to: "\(folder.path)/kvm1/a.pem", mode: 0o644)
        try Files.writeAtomically(other.publicKey.pem, to: "\(folder.path)/coordinator/a.pem", mode: 0o644)
        let ring = try KeyRing(folder: folder.path)
        try Files.writeAtomically([1, 2, 3], to: "\(folder.path)/kvm1/b.pem", mode: 0o644)
        try Files.writeAtomically(new.publicKey.pem, to: "\(folder.path)/coordinator/b.pem", mode: 0o644)
        let isRead = try await eventually { try ring.key(new.publicKey.id, of: "coordinator") }
        #expect(isRead != nil)
        #expect(try ring.key(key.publicKey.id, of: "kvm1") != nil)
        let error = try #require(failure { _ = try ring.key(new.publicKey.id, of: "kvm1") })
        #expect(error.message.contains("kvm1/b.pem"))
        #expect(failure { _ = try KeyRing(folder: folder.path) } != nil)
    }

    @Test(arguments: [
        ("kvm1", true), ("kvm-1.example.org", true), ("7", true), ("", false), ("coordinator", false), ("-a", false),
        ("a.", false), ("a/b", false), ("a b", false), ("*", false), ("#", false), ("ä", false),
        (String(repeating: "a", count: 64), false),
    ])
    func hostNames(_ name: String, _ isOne: Bool) { #expect(FleetMember.isHostName(name) == isOne) }

    @Test func folderThatOthersCanWriteIsRefused() throws {
        let folder = try TemporaryFolder("kvm1")
        chmod("\(folder.path)/kvm1", 0o777)
        #expect(failure { try KeyRing(folder: folder.path) }?.code == .permissionDenied)
    }

    /// Each of any number is believed, also alone and twice; with a byte changed, or on another's way, none is.
    @Test(arguments: [1, 2, 3, 7, 8, 256])
    func signedTogether(_ count: Int) throws {
        let (coordinator, worker) = FleetMember.pair(host: "kvm1")
        var messages = (0..<count).map { Message(exchange: "", routingKey: "", body: [1, UInt8($0)]) }
        coordinator.sign(&messages, for: "kvm1", validity: .seconds(60))
        for message in messages + messages.reversed() { #expect(try worker.verify(message) == "coordinator") }
        let signatures = messages.compactMap { $0.headers[Message.signatureHeader].map { "\($0)" } }
        #expect(Set(signatures).count == 1)
        let wrongs = { (wrong: Message) in failure { try worker.verify(wrong) }?.code == .unauthenticated }
        for (index, message) in messages.enumerated() {
            var wrong = message
            wrong.body[0] = 2
            #expect(wrongs(wrong))
            guard count > 1, case .bytes(let path)? = message.headers[Message.pathHeader] else { continue }
            let cuts = [[], Array(path.dropLast(33)), Array(path.dropLast()), path + path, [2] + path.dropFirst()]
            for path in cuts as [[UInt8]] {
                wrong = message
                wrong.headers[Message.pathHeader] = .bytes(path)
                #expect(wrongs(wrong))
            }
            wrong = message
            wrong.headers[Message.pathHeader] = messages[(index + 1) % count].headers[Message.pathHeader]
            #expect(wrongs(wrong))
            for value in [nil, .string("x")] as [HeaderValue?] {
                wrong.headers[Message.pathHeader] = value
                #expect(wrongs(wrong))
            }
        }
    }

    /// What a broker adds on the way isn't signed; everything else is.
    @Test func signedBytesAreStable() throws {
        var message = Message(exchange: "flotilla.tasks", routingKey: "kvm1", body: [0xca, 0xfe])
        message.type = "/flotilla.v1.ConvertService/Convert"
        message.contentType = "application/grpc+proto"
        message.correlationID = "m1-convert"
        message.messageID = "1"
        message.headers = [
            "flotilla-fence": .integer(-7), "a": .string("é"), "b-bin": .bytes([0]), "x-death": .string("once"),
        ]
        let field = { (bytes: [UInt8]) in [0, 0, 0, UInt8(bytes.count)] + bytes }
        let expected =
            [
                "flotilla-signature-v1", "/flotilla.v1.ConvertService/Convert", "application/grpc+proto", "m1-convert",
                "1",
                "a", "sé", "b-bin",
            ]
            .flatMap { field(Array($0.utf8)) } + field([UInt8(ascii: "b"), 0])
            + ["flotilla-fence", "i-7"].flatMap { field(Array($0.utf8)) } + field([0xca, 0xfe])
        #expect(message.signedBytes == expected)
    }

    private func bytes(_ hex: String) -> [UInt8] {
        stride(from: 0, to: hex.utf8.count, by: 2).map { start in
            let first = hex.index(hex.startIndex, offsetBy: start)
            return UInt8(hex[first...hex.index(after: first)], radix: 16) ?? 0
        }
    }
}
