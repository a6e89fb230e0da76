import Glibc

/// An IPv4 or IPv6 address, without the zone ("%eth0") that link-local ones may bear.
struct IPAddress: Equatable {
    /// 4 or 16, most significant first.
    let bytes: [UInt8]

    init?(_ text: String) {
        let plain = String(text.prefix { $0 != "%" })
        var bytes = [UInt8](repeating: 0, count: 16)
        if inet_pton(AF_INET, plain, &bytes) == 1 {
            self.bytes = Array(bytes[..<4])
        } else if inet_pton(AF_INET6, plain, &bytes) == 1 {
            self.bytes = bytes
        } else {
            return nil
        }
    }

    var isUnspecified: Bool { bytes.allSatisfy { $0 == 0 } }

    /// Whether both are of one family and their first `length` bits are the same; no such subnet for a length of 0.
    func shares(prefix length: UInt32, with other: IPAddress) -> Bool {
        guard bytes.count == other.bytes.count, (1...bytes.count * 8).contains(Int(length)) else { return false }
        let (whole, rest) = (Int(length) / 8, Int(length) % 8)
        guard bytes[..<whole] == other.bytes[..<whole] else { return false }
        return rest == 0 || (bytes[whole] ^ other.bytes[whole]) >> (8 - rest) == 0
    }
}
