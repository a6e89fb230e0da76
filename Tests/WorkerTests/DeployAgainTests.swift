import FlotillaProtocol
import Glibc
import MigrationModel
import Passthrough
import SwiftProtobuf
import TestKit
import Testing

@testable import Deploy
@testable import Worker

/// A domain that is there already, when its deploy comes again or it is taken back.
@Suite(.timeLimit(.minutes(1))) struct DeployAgainTests {
    private let second = AssignedDevice.with {
        ($0.id, $0.classCode) = ("gpu1", 0x0302)
        $0.passthrough.id = .with { ($0.vendor, $0.device) = (0x10de, 0x20b5) }
    }

    /// What came into use by the host after it was chosen is not kept from others once that use is over.
    @Test func whatItCouldNotHaveIsFree() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e")
        try await rig.handler().run(rig.request("wider", [a100]))
        let handler = rig.handler { try rig.use("5e") }
        let refused = await failure { try await handler.run(rig.request("wider", [a100, second]), fence: 2) }
        #expect(refused?.message.contains("network interface eth9") == true, "\(refused.map { "\($0)" } ?? "")")
        #expect(try rig.domain("wider") != nil)
        #expect(try rig.entries == ["pci:0000:3b:00.0 wider reserved"])
        try await rig.handler().takeBack("wider")
    }

    /// libvirt refuses the new definition: the one that is there keeps what it names, and nothing else is kept.
    @Test func whatTheRefusedDefinitionNamedIsFree() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        try await rig.handler().run(rig.request("refused", [a100]) { $0.options.start = true })
        let refused = await failure {
            try await rig.handler().run(rig.request("refused", [a100, t4Profile]), fence: 2)
        }
        #expect(refused?.message.contains("is to be defined otherwise now") == true)
        #expect(try rig.domain("refused")?.state() == .running)
        #expect(try rig.entries == ["pci:0000:3b:00.0 refused reserved"])
        #expect(try rig.machine.host().records().isEmpty && rig.machine.sysfs.list("bus/mdev/devices").isEmpty)
        try await rig.handler().takeBack("refused")
    }

    /// Somebody's domain got the name meanwhile: nothing is taken.
    @Test func theNameIsAnothers() async throws {
        let rig = try DeployRig()
        try rig.gpu("3b")
        try rig.gpu("5e", device: "0x1eb8", mdev: true)
        let connection = try LibvirtConnection(uri: rig.uri)
        let xml = """
            <domain type='test'><name>taken</name><memory>1024</memory><os><type>hvm</type></os></domain>
            """
        let handler = rig.handler { _ = try connection.define(xml, name: "taken") }
        let refused = await failure { try await handler.run(rig.request("taken", [a100, t4Profile])) }
        #expect(refused?.code == .alreadyExists, "\(refused.map { "\($0)" } ?? "")")
        #expect(try rig.entries.isEmpty && rig.machine.host().records().isEmpty)
        #expect(rig.machine.sysfs.list("bus/mdev/devices").isEmpty)
        try rig.domain("taken")?.undefine()
    }

    enum After: String, CaseIterable, Sendable { case takenBack, redeployed, runningWithIt }

    /// Somebody gave the domain another GPU by hand: no other VM gets that before it was reset.
    @Test(arguments: After.allCases) func whatWasAddedByHandIsDirty(_ after: After) async throws {
        let rig = try DeployRig()
        for bus in ["3b", "5e", "86"] { try rig.gpu(bus) }
        let name = "hand-\(after)"
        try await rig.handler().run(rig.request(name, [a100]))
        let other = GPUOwner(domain: "other", migration: "m-other", fence: 1)
        let reserved = GPUResource(function: try #require(PciAddress("0000:86:00.0")))
        try rig.machine.ledger.reserve([reserved], for: other)
        let added = ["5e", "86"].map { bus in
            """
            <hostdev mode='subsystem' type='pci' managed='yes'><source>
              <address domain='0x0000' bus='0x\(bus)' slot='0x00' function='0x0'/>
            </source></hostdev>
            """
        }
        let xml = try #require(try rig.domain(name)).xml()
        let connection = try LibvirtConnection(uri: rig.uri)
        let changed = try connection.define(
            xml.replacing("</devices>", with: added.joined() + "</devices>"), name: name)
        if after == .runningWithIt {
            // As a device that was plugged in: no definition names it.
            try changed.start()
            _ = try connection.define(xml, name: name)
        }
        if after == .redeployed {
            try await rig.handler().run(rig.request(name, [a100]), fence: 2)
        } else {
            #expect(try await rig.handler().takeBack(name).devices.sorted() == ["0000:3b:00.0", "0000:5e:00.0"])
        }
        #expect(
            try rig.entries == [
                "pci:0000:3b:00.0 \(name) \(after == .redeployed ? "reserved" : "dirty")",
                "pci:0000:5e:00.0 \(name) dirty",
                "pci:0000:86:00.0 other reserved",
            ])
        try await rig.handler().takeBack(name, fence: 10)
    }
}
