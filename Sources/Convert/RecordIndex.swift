/// Where in a log each chunk's latest record lies. 4 bytes per chunk, kept in pages of 128 chunks that appear with
/// their first record: 1 MiB for a full disk of 1 TiB, about 70 MiB for one of 62 TiB.
struct RecordIndex {
    private static let pageSize: UInt64 = 128
    private static let confirmed: UInt32 = 1 << 31

    private var pages: [UInt32: [UInt32]] = [:]

    /// The position of a chunk's record, counted in records (at least 1, below 2^31); nil for none.
    func position(of chunk: UInt64) -> UInt64? {
        guard let entry = pages[Self.page(chunk)]?[Self.place(chunk)], entry != 0 else { return nil }
        return UInt64(entry & ~Self.confirmed)
    }

    /// - Parameter isConfirmed: the image holds what the record says.
    mutating func set(_ chunk: UInt64, position: UInt64, isConfirmed: Bool) {
        precondition(position > 0 && position < UInt64(Self.confirmed))
        pages[Self.page(chunk), default: Array(repeating: 0, count: Int(Self.pageSize))][Self.place(chunk)] =
            UInt32(position) | (isConfirmed ? Self.confirmed : 0)
    }

    mutating func confirm(_ chunk: UInt64) { pages[Self.page(chunk)]?[Self.place(chunk)] |= Self.confirmed }

    mutating func remove(_ chunk: UInt64) { pages[Self.page(chunk)]?[Self.place(chunk)] = 0 }

    /// Calls `body` with the positions of all confirmed records, in ascending order of their chunks.
    func forEachConfirmed(_ body: (UInt64) throws -> Void) rethrows {
        for number in pages.keys.sorted() {
            for entry in pages[number] ?? [] where entry & Self.confirmed != 0 {
                try body(UInt64(entry & ~Self.confirmed))
            }
        }
    }

    /// All positions, the last first.
    func newestFirst() -> [UInt32] {
        var positions: [UInt32] = []
        for page in pages.values { positions += page.lazy.map { $0 & ~Self.confirmed }.filter { $0 != 0 } }
        positions.sort(by: >)
        return positions
    }

    private static func page(_ chunk: UInt64) -> UInt32 { UInt32(chunk / pageSize) }
    private static func place(_ chunk: UInt64) -> Int { Int(chunk % pageSize) }
}
