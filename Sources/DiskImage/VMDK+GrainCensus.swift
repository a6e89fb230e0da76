import MigrationModel

extension VMDK {
    /// Compares the grains a stream brought with those its tables name, without holding either: per grain table two
    /// order-independent fingerprints over (index in the table, sector), one of the grains seen, one of the entries.
    /// 40 bytes for each table that has grains, 1.3 MB per TiB of data.
    struct GrainCensus {
        private let header: Header
        private let name: String
        /// By grain table number.
        private var seen: [UInt64: UInt64] = [:]
        /// By the sector the table lies at.
        private var tables: [UInt64: UInt64] = [:]
        private var directory: (entries: [UInt32], sector: UInt64)?
        private var footer: Header?

        init(_ header: Header, name: String) {
            self.header = header
            self.name = name
        }

        mutating func add(_ grain: UInt64, sector: UInt64) {
            let perTable = UInt64(Header.entriesPerTable)
            seen[grain / perTable, default: 0] &+= Self.fingerprint(grain % perTable, sector)
        }

        mutating func take(table bytes: [UInt8], sector: UInt64) {
            var sum: UInt64 = 0
            for index in 0..<min(Header.entriesPerTable, bytes.count / 4) {
                let entry = bytes.littleEndian(at: index * 4, as: UInt32.self)
                if entry == 0 || entry == 1 && header.hasZeroedGrains { continue }
                sum &+= Self.fingerprint(UInt64(index), UInt64(entry))
            }
            tables[sector] = sum
        }

        mutating func take(directory bytes: [UInt8], sector: UInt64) throws {
            guard UInt64(bytes.count) >= header.directoryCount * 4 else {
                throw MigrationError.damaged(name, "its grain directory has \(bytes.count / 4) entries")
            }
            let entries = (0..<Int(header.directoryCount)).map { bytes.littleEndian(at: $0 * 4, as: UInt32.self) }
            directory = (entries, sector)
        }

        mutating func take(footer bytes: [UInt8]) throws {
            let copy = try Header(parsing: bytes.span.bytes, name: "\(name) (footer)")
            guard copy.capacity == header.capacity, copy.grainSectors == header.grainSectors, copy.isCompressed,
                header.grainDirectory == Header.directoryAtEnd || copy.grainDirectory == header.grainDirectory
            else { throw MigrationError.damaged(name, "header and footer contradict each other") }
            footer = copy
        }

        /// Where the directory says its tables are, ascending.
        var tableSectors: [UInt64] {
            Set(directory?.entries ?? []).filter { $0 != 0 }.map(UInt64.init).sorted()
        }

        /// Throws unless directory, tables and grains agree.
        func finish() throws {
            if header.grainDirectory == Header.directoryAtEnd {
                guard let footer else { throw MigrationError.truncated(name, "the stream ends without its footer") }
                guard let directory, directory.sector == footer.grainDirectory else {
                    throw MigrationError.damaged(name, "its footer points to a grain directory that isn't there")
                }
            }
            guard let directory else { throw MigrationError.damaged(name, "it has no grain directory") }
            var known = 0
            for (number, sector) in directory.entries.enumerated() where sector != 0 {
                guard let stated = tables[UInt64(sector)] else {
                    throw MigrationError.damaged(name, "grain table \(number) isn't at sector \(sector)")
                }
                let found = seen[UInt64(number)]
                if found != nil { known += 1 }
                guard stated == found ?? 0 else {
                    throw MigrationError.damaged(name, "grain table \(number) names other grains than the stream has")
                }
            }
            guard known == seen.count else {
                throw MigrationError.damaged(name, "it has grains that its grain directory doesn't know")
            }
        }

        /// SplitMix64's finalizer.
        private static func fingerprint(_ index: UInt64, _ sector: UInt64) -> UInt64 {
            var z = (index << 40 | sector) &+ 0x9E37_79B9_7F4A_7C15
            z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
            z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
            return z ^ z >> 31
        }
    }
}
