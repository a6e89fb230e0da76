import FlotillaProtocol
import HostKit
import MigrationModel
import Synchronization
import TestKit
import Testing

@testable import VSphere

/// Inventories that are interrupted between or inside their pages.
@Suite struct InventoryFaultTests {
    private static let names = (0..<9).map { "vm\($0)" }

    private func server(
        _ trouble: @escaping @Sendable (String, Int, String) -> FakeVCenter.Trouble? = { _, _, _ in nil }
    ) throws -> FakeVCenter {
        let machines = Self.names.map { name in
            var machine = MachineXML()
            machine.name = name
            return machine.xml
        }
        return try FakeVCenter(places: MachineXML().places, machines: machines, pageSize: 2, trouble: trouble)
    }

    private func names(from server: FakeVCenter, _ client: VIMClient) throws -> [String] {
        let source = try VSphereURL(parsing: "vsphere://me@\(server.authority)/")
        var names: [String] = []
        try Inventory(client, source, stop: StopFlag()).virtualMachines(stop: StopFlag()) { names.append($0.vm.name) }
        return names
    }

    @Test func pagesFollowEachOther() throws {
        let server = try server()
        #expect(try names(from: server, server.client()) == Self.names)
        // Two of 3 datastores, five of 9 VMs.
        #expect(server.calls("RetrievePropertiesEx") == 2 && server.calls("ContinueRetrievePropertiesEx") == 1 + 4)
        #expect(server.calls("Login") == 1)
    }

    /// A new session knows no page of the old one: the collector is asked from the beginning, and each VM comes once.
    @Test(arguments: [2, 3, 5]) func aSessionThatEndsBetweenPagesIsOpenedAgain(_ page: Int) throws {
        let server = try server { method, call, _ in
            method == "ContinueRetrievePropertiesEx" && call == page ? .expired : nil
        }
        #expect(try names(from: server, server.client()) == Self.names)
        #expect(server.calls("Login") == 2)
        #expect(server.calls("RetrievePropertiesEx") == 3 && server.calls("CreateContainerView") == 3)
    }

    @Test func aSessionThatEndsBeforeTheViewIsOpenedAgain() throws {
        let server = try server { method, call, _ in
            method == "CreateContainerView" && call == 2 || method == "RetrievePropertiesEx" && call == 1
                ? .expired : nil
        }
        #expect(try names(from: server, server.client()) == Self.names)
        #expect(server.calls("Login") == 3)
    }

    @Test func aServerThatForgetsEverySessionIsGivenUp() throws {
        let server = try server { method, _, _ in method == "ContinueRetrievePropertiesEx" ? .expired : nil }
        let client = try server.client()
        let error = try #require(failure { try names(from: server, client) })
        #expect(error.code == .unavailable && error.message.contains("NotAuthenticated"), "\(error)")
    }

    /// Neither half a page nor a lost one makes a VM missing or come twice.
    @Test(arguments: [FakeVCenter.Trouble.cut, .cutInside]) func aPageThatBreaksOffIsAskedForAgain(
        _ trouble: FakeVCenter.Trouble
    ) throws {
        let server = try server { method, call, _ in
            method == "ContinueRetrievePropertiesEx" && call == 3 || method == "RetrievePropertiesEx" && call == 2
                ? trouble : nil
        }
        #expect(try names(from: server, server.client()) == Self.names)
        #expect(server.calls("Login") == 1)
    }

    @Test func aServerThatAlwaysBreaksOffIsGivenUp() throws {
        let server = try server { method, _, _ in method == "ContinueRetrievePropertiesEx" ? .cut : nil }
        let client = try server.client()
        let error = try #require(failure { try names(from: server, client) })
        #expect(error.code == .unavailable && error.message.contains("broke off"), "\(error)")
        #expect(server.calls("ContinueRetrievePropertiesEx") == 3)
    }

    /// Nobody is to come back later for what lasts, and each attempt before is told.
    @Test func whatLastsIsFinal() throws {
        let server = try server { method, call, _ in
            method == "RetrieveServiceContent" ? (call == 1 ? .cut : .page) : nil
        }
        let told = Mutex<[String]>([])
        var access = server.server
        access.willRetry = { line in told.withLock { $0.append(line) } }
        let error = try #require(failure { try VIMClient(access) })
        #expect(error.code == .permissionDenied && error.message.contains("text/html"), "\(error)")
        #expect(error.hint?.contains("proxy") == true)
        let lines = told.withLock { $0 }
        #expect(lines.count == 1 && lines[0].contains(server.authority), "\(lines)")

        access.scheme = "https"
        let plain = try #require(failure { try VIMClient(access) })
        #expect(plain.code == .unauthenticated && plain.hint?.contains("check the port") == true, "\(plain)")
    }

    @Test func whoMistypesANameIsToldTheNearest() throws {
        #expect(nearest(to: "wbe 0", among: ["web 0", "db 1", "web 10", "x"]) == ["web 0"])
        #expect(nearest(to: "WEB", among: ["web", "database"]) == ["web"])
        #expect(nearest(to: "render", among: ["render-node-17", "db"]) == ["render-node-17"])
        #expect(nearest(to: "nothing like it", among: ["web", "db"]) == [])
        let server = try server()
        let client = try server.client()
        let source = try VSphereURL(parsing: "vsphere://me@\(server.authority)/?vm=mv3")
        let error = try #require(
            failure { try Inventory(client, source, stop: StopFlag()).virtualMachine(stop: StopFlag()) })
        #expect(error.code == .notFound && error.hint?.contains("among them 'vm3'") == true, "\(error)")
    }

    @Test func aPropertyTheServerIsTooOldForIsLeftOut() throws {
        let server = try server { _, _, body in
            body.contains("<pathSet>config.deviceGroups</pathSet>")
                ? .fault("InvalidProperty", "<name>config.deviceGroups</name>") : nil
        }
        #expect(try names(from: server, server.client()) == Self.names)
    }
}
