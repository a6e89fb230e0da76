package import MigrationModel
package import SwiftProtobuf

extension Moment {
    package var timestamp: Google_Protobuf_Timestamp {
        .with {
            $0.seconds = milliseconds / 1000
            $0.nanos = Int32(milliseconds % 1000) * 1_000_000
        }
    }
}

extension Google_Protobuf_Timestamp {
    /// As RFC 3339, in UTC.
    package var text: String { (try? jsonString())?.filter { $0 != "\"" } ?? "-" }

    /// Years 1 to 9999, as protobuf has it; what a message holds beyond counts as their end.
    package var moment: Moment {
        Moment(milliseconds: min(max(seconds, -62_135_596_800), 253_402_300_799) * 1000 + Int64(nanos / 1_000_000))
    }
}
