import MigrationModel

extension VMDK {
    /// The header of a hosted sparse extent (`SparseExtentHeader`), or its copy at the end of a stream.
    ///
    /// | byte | field | | byte | field |
    /// |---|---|---|---|---|
    /// | 0 | magic `KDMV` | | 48 | redundant grain directory |
    /// | 4 | version 1…3 | | 56 | grain directory |
    /// | 8 | flags | | 64 | sectors of metadata |
    /// | 12 | capacity | | 72 | unclean shutdown |
    /// | 20 | grain size | | 73 | `\n`, ` `, `\r\n` |
    /// | 28 | descriptor, its size at 36 | | 77 | compression |
    /// | 44 | entries per grain table | | 79 | padding |
    ///
    /// A value of this type has passed every check that needs no other part of the file; its products don't overflow.
    struct Header: Sendable {
        static let size = 512
        /// Grain directory offset that means 'see the footer'.
        static let directoryAtEnd = UInt64.max
        static let entriesPerTable = 512
        private static let maximumDescriptorSectors: UInt64 = 2048

        /// Sectors.
        let capacity: UInt64
        /// Sectors; a power of two. A grain never crosses a chunk.
        let grainSectors: UInt64
        let descriptor: (sector: UInt64, sectors: UInt64)?
        /// A sector, or `directoryAtEnd`.
        let grainDirectory: UInt64
        /// Sectors before the first grain. At most 2^40, unchecked otherwise.
        let overhead: UInt64
        let isCompressed: Bool
        /// Grain table entry 1 means a grain of zeros.
        let hasZeroedGrains: Bool

        init(parsing bytes: RawSpan, name: String) throws {
            func malformed(_ what: String) -> MigrationError { .malformed(name, "sparse header: \(what)") }
            guard bytes.byteCount >= Header.size, bytes.littleEndian(at: 0, as: UInt32.self) == 0x564D_444B else {
                throw malformed("no KDMV magic")
            }
            let version: UInt32 = bytes.littleEndian(at: 4)
            guard (1...3).contains(version) else {
                throw MigrationError(.unimplemented, "\(name): VMDK sparse version \(version); 1 to 3 are known")
            }
            let flags: UInt32 = bytes.littleEndian(at: 8)
            if flags & 1 != 0 {
                let detector = (73..<77).map { bytes.littleEndian(at: $0, as: UInt8.self) }
                guard detector == [0x0A, 0x20, 0x0D, 0x0A] else {
                    throw MigrationError(
                        .dataLoss, "\(name): line ends in the header were rewritten: it was transferred as text",
                        hint: "copy the file again in binary mode")
                }
            }
            guard bytes.littleEndian(at: 72, as: UInt8.self) == 0 else {
                throw MigrationError(
                    .failedPrecondition, "\(name): marked as not closed cleanly: a VM has it open or died with it",
                    hint: "power the VM off; after a crash repair the disk with vmware-vdiskmanager -R")
            }
            capacity = bytes.littleEndian(at: 12)
            guard capacity > 0 else { throw malformed("the disk has no capacity") }
            guard capacity <= Chunk.maximumCapacity / sectorSize else {
                throw tooLarge(name, "\(capacity) sectors")
            }
            grainSectors = bytes.littleEndian(at: 20)
            let largest = UInt64(Chunk.size) / sectorSize
            guard grainSectors >= 8, grainSectors <= largest, grainSectors & (grainSectors - 1) == 0 else {
                throw malformed("a grain of \(grainSectors) sectors; powers of two from 8 to \(largest) are allowed")
            }
            let entries: UInt32 = bytes.littleEndian(at: 44)
            guard entries == Header.entriesPerTable else {
                throw malformed("\(entries) entries per grain table instead of \(Header.entriesPerTable)")
            }
            let place: UInt64 = bytes.littleEndian(at: 28)
            let sectors: UInt64 = bytes.littleEndian(at: 36)
            guard sectors <= Header.maximumDescriptorSectors else {
                throw malformed("an embedded descriptor of \(sectors) sectors")
            }
            descriptor = place > 0 && sectors > 0 ? (place, sectors) : nil
            grainDirectory = bytes.littleEndian(at: 56)
            overhead = bytes.littleEndian(at: 64)
            guard overhead <= Chunk.maximumCapacity / sectorSize else {
                throw malformed("\(overhead) sectors of metadata")
            }
            let compression: UInt16 = bytes.littleEndian(at: 77)
            isCompressed = flags & 1 << 16 != 0
            guard compression == (isCompressed ? 1 : 0) else {
                throw MigrationError(
                    .unimplemented,
                    "\(name): compression algorithm \(compression) with flags 0x\(String(flags, radix: 16));"
                        + " only deflate with compressed grains is known")
            }
            guard isCompressed == (flags & 1 << 17 != 0) else {
                throw MigrationError(
                    .unimplemented, "\(name): compressed grains without markers, or markers without compression")
            }
            guard isCompressed || grainDirectory != Header.directoryAtEnd else {
                throw malformed("the grain directory of an uncompressed disk can't be at its end")
            }
            hasZeroedGrains = flags & 4 != 0
        }

        /// Bytes.
        var grainSize: Int { Int(grainSectors * sectorSize) }
        /// Guest bytes one grain table covers.
        var tableSpan: UInt64 { UInt64(Header.entriesPerTable * grainSize) }
        /// Entries in the grain directory, 32 bits each.
        var directoryCount: UInt64 { (capacity * sectorSize + tableSpan - 1) / tableSpan }
    }
}
