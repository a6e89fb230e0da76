import HostKit
import MigrationModel

extension VMDK {
    /// A hosted sparse or streamOptimized extent whose header has been validated against its file.
    struct SparseExtent: Extent {
        /// The footer's when the extent is a stream with its directory at the end.
        let header: Header
        /// Where the embedded descriptor lies: the header's word, since some footers leave it out.
        let descriptor: (sector: UInt64, sectors: UInt64)?
        let source: SourceFile
        /// Guest bytes; a descriptor may give less than the header.
        let capacity: UInt64

        init(_ file: File, _ source: SourceFile) throws {
            let start = try file.readExactly(at: source.offset, count: Int(min(source.length, 512)))
            guard start.count == Header.size else {
                throw MigrationError.truncated(
                    source.path, "no room for a header", missing: UInt64(Header.size - start.count))
            }
            let first = try Header(parsing: start.span.bytes, name: source.path)
            header =
                first.grainDirectory == Header.directoryAtEnd
                ? try SparseExtent.footer(file, source, matching: first) : first
            descriptor = first.descriptor
            self.source = source
            capacity = header.capacity * sectorSize
            if let descriptor {
                try source.require(
                    sector: descriptor.sector, bytes: descriptor.sectors * sectorSize, "the embedded descriptor")
            }
            guard header.grainDirectory > 0 else {
                throw MigrationError.malformed(source.path, "sparse header: no grain directory")
            }
            try source.require(
                sector: header.grainDirectory, bytes: header.directoryCount * 4, "the grain directory")
        }

        private init(_ other: SparseExtent, capacity: UInt64) {
            header = other.header
            descriptor = other.descriptor
            source = other.source
            self.capacity = capacity
        }

        /// The same extent, cut to its first `capacity` bytes.
        func limited(to capacity: UInt64) -> SparseExtent { SparseExtent(self, capacity: capacity) }

        func makeReader() throws -> sending any ExtentReader {
            SparseReader(self, try source.open())
        }

        /// nil unless the extent is compressed and the whole of its file.
        func makeForwardReader(_ stream: any ByteSource) throws -> ForwardReader? {
            guard header.isCompressed, capacity == header.capacity * sectorSize else { return nil }
            return try ForwardReader(stream, self, GrainTables(self, source.open()))
        }

        /// Finds the footer at the end of a stream. A few sectors of zero padding behind the end are tolerated.
        private static func footer(_ file: File, _ source: SourceFile, matching first: Header) throws -> Header {
            let sectors = source.length / sectorSize
            let tail = Int(min(sectors, 131))
            let bytes = try file.readExactly(
                at: source.offset + (sectors - UInt64(tail)) * sectorSize, count: tail * 512)
            // A marker has size 0 in bytes 8 to 11 and its type, 3 for a footer, behind it.
            func isFooter(_ index: Int) -> Bool {
                index >= 1 && bytes.littleEndian(at: index * 512, as: UInt32.self) == 0x564D_444B
                    && bytes.littleEndian(at: index * 512 - 504, as: UInt64.self) == 3 << 32
            }
            var index = tail - 1
            while index >= 0, isZeroSector(bytes, index) { index -= 1 }
            guard isFooter(index) else {
                throw MigrationError.truncated(
                    source.path,
                    "the stream ends at byte \(source.length) without its footer and end-of-stream marker")
            }
            guard index < tail - 1 else {
                throw MigrationError.truncated(
                    source.path, "the end-of-stream marker is missing",
                    missing: sectorSize - source.length % sectorSize)
            }
            let copy = Array(bytes[index * 512..<index * 512 + 512])
            let footer = try Header(parsing: copy.span.bytes, name: "\(source.path) (footer)")
            guard footer.capacity == first.capacity, footer.grainSectors == first.grainSectors, footer.isCompressed,
                footer.grainDirectory != Header.directoryAtEnd
            else { throw MigrationError.damaged(source.path, "header and footer contradict each other") }
            return footer
        }

        private static func isZeroSector(_ bytes: [UInt8], _ index: Int) -> Bool {
            bytes.withUnsafeBytes { isZero(UnsafeRawBufferPointer(rebasing: $0[index * 512..<index * 512 + 512])) }
        }
    }
}

extension SourceFile {
    /// Throws unless `bytes` bytes from `sector` on lie in the file. Doesn't overflow whatever the input.
    func require(sector: UInt64, bytes: UInt64, _ what: String) throws {
        let start = sector.multipliedReportingOverflow(by: VMDK.sectorSize)
        let end = start.partialValue.addingReportingOverflow(bytes)
        guard !start.overflow, !end.overflow, end.partialValue <= length else {
            throw MigrationError.truncated(
                path, "\(what) at sector \(sector) ends outside the \(length) bytes there are",
                missing: start.overflow || end.overflow ? nil : end.partialValue - length)
        }
    }
}
