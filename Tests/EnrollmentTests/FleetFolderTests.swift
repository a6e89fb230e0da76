import Enrollment
import HostKit
import Messaging
import MigrationModel
import TestKit
import Testing

/// What becomes of the files: after a crash, of a dry run, when a host is forgotten.
@Suite struct FleetFolderTests {
    private typealias Rig = EnrollmentTests.Rig

    /// The file that can't be written stands for the moment of a crash.
    @Test(arguments: ["ca.pem", "ca.key", "signing.key", "tls.key", "tls.pem"])
    func interruptedInitGoesOn(_ file: String) throws {
        let rig = try Rig(makesFleet: false)
        let obstacle = "\(rig.coordinator.path)/\(file).tmp"
        try Files.createDirectories(obstacle)
        #expect(failure { try Enrollment.makeFleet(in: rig.coordinator) } != nil)
        try Files.remove(obstacle)
        try Enrollment.makeFleet(in: rig.coordinator)
        let certificate = rig.coordinator.certificate
        #expect(try rig.openssl("verify", "-CAfile", rig.coordinator.authority, certificate) == "\(certificate): OK\n")
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        let answer = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        #expect(try Enrollment.accept(answer.json, in: rig.host).host == "kvm1")
    }

    /// A second authority would be believed by nobody who joined before; a host's folder has no authority at all.
    @Test func authorityWithoutItsKeyIsNotMadeAnew() throws {
        let rig = try Rig()
        try Files.remove(rig.coordinator.authorityKey)
        let before = try rig.files()
        #expect(failure { try Enrollment.makeFleet(in: rig.coordinator) }?.code == .failedPrecondition)
        #expect(try rig.files() == before)
    }

    @Test(arguments: ["", ".", "..", "../..", "kvm1/../kvm2", "kvm1/", "/", "coordinator"])
    func whatNamesNoHostIsNotForgotten(_ name: String) throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        _ = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        let before = try rig.files()
        #expect(failure { try rig.coordinator.forget(name) }?.code == .invalidArgument)
        #expect(try rig.files() == before)
    }

    @Test func mistypedHostOrKeyIsNotForgotten() throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        _ = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        let before = try rig.files()
        for kept in ["nonsense", "", "../kvm1/\(request.keyID)", "\(request.keyID).pem"] {
            let error = failure { try rig.coordinator.forget("kvm1", except: kept) }
            #expect(error?.code == .notFound && error?.hint?.contains(request.keyID) == true, "\(kept)")
        }
        #expect(failure { try rig.coordinator.forget("kvm2") }?.hint?.contains("kvm1") == true)
        #expect(failure { try rig.coordinator.forget("coordinator", except: request.keyID) }?.code == .notFound)
        #expect(try rig.files() == before)
    }

    @Test func onlyKeysAreRemoved() throws {
        let rig = try Rig()
        let request = try Enrollment.ask(host: "kvm1", in: rig.host)
        _ = try Enrollment.grant(request.json, in: rig.coordinator, replaces: false)
        let folder = "\(rig.coordinator.trusted)/kvm1"
        try Files.writeAtomically([1], to: "\(folder)/notes.txt")
        try Files.createDirectories("\(folder)/before")
        #expect(try rig.coordinator.forget("kvm1") == [request.keyID])
        #expect(try Files.list(folder) == ["before", "notes.txt"])
        #expect(try rig.coordinator.forget("kvm1") == [])
        #expect(try rig.coordinator.hosts().isEmpty)
    }

    /// Each dry run says just what the run then does.
    @Test func dryRunsTellTheTruth() throws {
        let rig = try Rig(makesFleet: false)
        @discardableResult
        func same<Value>(_ folder: FleetFolder, _ body: (FleetFolder) throws -> Value) throws -> Value {
            let before = try rig.files()
            let plan = FleetFolder.Plan()
            _ = try body(FleetFolder(folder.path, plan: plan))
            #expect(try rig.files() == before)
            let value = try body(folder)
            let after = try rig.files()
            let own = Files.exists(folder.signingKey) ? try SigningKey(path: folder.signingKey).publicKey.id : ""
            let paths = plan.steps.map { $0.replacing("ID-OF-THE-NEW-KEY", with: own) }
            func told(_ verb: String) -> Set<String> {
                Set(paths.filter { $0.hasPrefix("\(verb) ") }.map { String($0.split { $0 == " " || $0 == "," }[1]) })
            }
            // What is written again may come out the same.
            #expect(told("write").isSuperset(of: after.keys.filter { after[$0] != before[$0] }), "\(plan.steps)")
            #expect(told("write").isSubset(of: after.keys), "\(plan.steps)")
            #expect(told("remove") == Set(before.keys).subtracting(after.keys), "\(plan.steps)")
            #expect(
                plan.steps.contains("make folder \(folder.path), mode 755")
                    == before.keys.allSatisfy {
                        !$0.hasPrefix("\(folder.path)/")
                    })
            return value
        }
        try same(rig.coordinator) { try Enrollment.makeFleet(in: $0) }
        let first = try same(rig.host) { try Enrollment.ask(host: "kvm1", in: $0) }
        let answer = try same(rig.coordinator) { try Enrollment.grant(first.json, in: $0, replaces: false) }
        try same(rig.host) { try Enrollment.accept(answer.json, in: $0) }
        try Files.remove(rig.host.signingKey)
        let second = try same(rig.host) { try Enrollment.ask(host: "kvm1", in: $0) }
        try same(rig.coordinator) { try Enrollment.grant(second.json, in: $0, replaces: true) }
        #expect(try same(rig.coordinator) { try $0.forget("kvm1") } == [second.keyID])
        try same(rig.coordinator) { try Enrollment.makeFleet(in: $0) }
        try same(rig.coordinator) {
            try Enrollment.brokerCertificate("rabbit1", in: $0, to: "\(rig.folder.path)/rabbit1")
        }
    }
}
