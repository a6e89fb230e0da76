import FoundationEssentials
package import MigrationModel

/// An id for a migration that begins now: a UUID of version 7 (RFC 9562), whose first 48 bits are the time. Migrations of
/// one time, and with them their tasks and events, so lie side by side in the store, however many it holds.
package func makeMigrationID(at now: Moment) -> String {
    var bytes = UUID().uuid
    withUnsafeMutableBytes(of: &bytes) { bytes in
        for index in 0..<6 { bytes[index] = UInt8(truncatingIfNeeded: now.milliseconds >> (8 * (5 - index))) }
        bytes[6] = 0x70 | bytes[6] & 0x0F
    }
    return UUID(uuid: bytes).uuidString.lowercased()
}
