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
    package var moment: Moment { Moment(milliseconds: seconds * 1000 + Int64(nanos / 1_000_000)) }
}
