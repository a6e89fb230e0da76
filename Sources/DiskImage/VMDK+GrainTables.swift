import HostKit
import MigrationModel

extension VMDK {
    /// Grain directory and tables of one extent, read on demand. Holds one table (2 KiB) and one piece of the
    /// directory (4 KiB), whatever the capacity. One thread at a time.
    struct GrainTables {
        private static let pageEntries: UInt64 = 1024

        private let extent: SparseExtent
        private let file: File
        private var page: (index: UInt64, entries: [UInt32])?
        private var table: (index: UInt64, entries: [UInt32])?

        init(_ extent: SparseExtent, _ file: File) {
            self.extent = extent
            self.file = file
        }

        /// What the grain table says about a grain.
        enum Entry {
            case hole
            /// Known to be zeros: in a delta, whatever its parent has there.
            case zero
            /// The first sector of the grain, or of its marker.
            case sector(UInt64)
        }

        mutating func entry(_ grain: UInt64) throws -> Entry {
            let perTable = UInt64(Header.entriesPerTable)
            guard let entries = try load(table: grain / perTable) else { return .hole }
            return try interpret(entries[Int(grain % perTable)], grain)
        }

        private func interpret(_ value: UInt32, _ grain: UInt64) throws -> Entry {
            if value == 0 { return .hole }
            if value == 1 && extent.header.hasZeroedGrains { return .zero }
            guard value > 1 else {
                throw MigrationError.damaged(
                    extent.source.path, "grain \(grain) points into the header (sector \(value))")
            }
            return .sector(UInt64(value))
        }

        /// The first grain at or after `grain` that is stored, among the first `limit`.
        mutating func nextStored(from grain: UInt64, limit: UInt64) throws -> UInt64? {
            let perTable = UInt64(Header.entriesPerTable)
            var grain = grain
            while grain < limit {
                let index = grain / perTable
                let end = min(limit, (index + 1) * perTable)
                guard let entries = try load(table: index) else {
                    grain = end
                    continue
                }
                while grain < end {
                    let value = entries[Int(grain % perTable)]
                    if value > 1 || value == 1 && !extent.header.hasZeroedGrains { return grain }
                    grain += 1
                }
            }
            return nil
        }

        /// nil when the directory has no such table: all its grains are holes.
        private mutating func load(table index: UInt64) throws -> [UInt32]? {
            if let table, table.index == index { return table.entries }
            let sector = UInt64(try directoryEntry(index))
            guard sector != 0 else { return nil }
            try extent.source.require(sector: sector, bytes: UInt64(Header.entriesPerTable * 4), "grain table \(index)")
            let entries = try read(at: sector * sectorSize, count: Header.entriesPerTable)
            table = (index, entries)
            return entries
        }

        private mutating func directoryEntry(_ index: UInt64) throws -> UInt32 {
            let number = index / GrainTables.pageEntries
            if page?.index != number {
                let first = number * GrainTables.pageEntries
                let count = min(GrainTables.pageEntries, extent.header.directoryCount - first)
                page = (
                    number,
                    try read(at: extent.header.grainDirectory * sectorSize + first * 4, count: Int(count))
                )
            }
            return page?.entries[Int(index % GrainTables.pageEntries)] ?? 0
        }

        private func read(at offset: UInt64, count: Int) throws -> [UInt32] {
            try [UInt32](unsafeUninitializedCapacity: count) { buffer, initialized in
                let bytes = UnsafeMutableRawBufferPointer(buffer)
                let got = try file.read(at: extent.source.offset + offset, into: bytes)
                guard got == count * 4 else {
                    throw MigrationError.truncated(
                        extent.source.path, "its grain tables ended while being read", missing: UInt64(count * 4 - got))
                }
                for index in 0..<count { buffer[index] = UInt32(littleEndian: buffer[index]) }
                initialized = count
            }
        }
    }
}
