import FlotillaProtocol
import Testing

@testable import VSphere

@Suite struct GatewayTests {
    private func route(_ network: String, _ gateway: String, _ device: String, length: Int = 0) throws -> VIMNode {
        let reader = try VIMReader(name: "test", each: nil) { _ in }
        let text = """
            <ipRoute><network>\(network)</network><prefixLength>\(length)</prefixLength><gateway>\
            <ipAddress>\(gateway)</ipAddress><device>\(device)</device></gateway></ipRoute>
            """
        try Array(text.utf8).withUnsafeBytes { try reader.feed($0) }
        return try reader.finish()
    }

    @Test(
        arguments: [
            ("10.0.0.7", 24, "manual", 0, "10.0.0.1"),
            // Another subnet's, but through this card; through another card.
            ("192.0.2.7", 32, "manual", 0, "10.0.0.1"), ("192.0.2.7", 32, "manual", 1, "10.9.0.1"),
            ("192.0.2.7", 24, "manual", 2, ""), ("10.0.1.7", 23, "dhcp", 2, "10.0.0.1"),
            ("10.0.0.7", 0, "", 2, ""), ("10.0.0.7", 33, "", 2, ""),
            ("2001:db8::7", 64, "manual", 0, "fe80::1%eth0"), ("2001:db8:1::7", 64, "manual", 0, "2001:db8:1::1"),
            ("2001:db8::7", 64, "other", 2, ""), ("fe80::7", 64, "linklayer", 0, ""),
            ("no address", 24, "manual", 0, ""),
        ] as [(String, UInt32, String, Int, String)])
    func isThatOfTheSubnetOrTheCard(
        _ ip: String, _ length: UInt32, _ origin: String, _ card: Int, _ gateway: String
    ) throws {
        var address = GuestAddress()
        (address.ip, address.prefixLength, address.origin) = (ip, length, origin)
        let routes = [
            try route("10.0.0.0", "10.0.0.254", "0", length: 24), try route("192.0.2.0", "192.0.2.9", "2"),
            try route("0.0.0.0", "none", "2"), try route("0.0.0.0", "10.0.0.1", "0"),
            try route("0.0.0.0", "10.9.0.1", "1"), try route("::", "fe80::1%eth0", "0"),
            try route("0:0:0:0:0:0:0:0", "2001:db8:1::1", "1"),
        ]
        #expect(VMCapture.gateway(for: address, of: card, routes) == gateway)
    }
}
