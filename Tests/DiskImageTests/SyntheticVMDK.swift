/// Builds sparse VMDKs byte by byte, the way ESXi lays them out, so that tests can bend any field. Written from the
/// specification, sharing nothing with the reader.
struct SyntheticVMDK {
    enum Style: CaseIterable { case stream, streamWithoutFooter, sparse }

    var style = Style.stream
    var capacity: UInt64 = 40
    var grainSectors: UInt64 = 8
    /// By grain number; the last one may be short.
    var grains: [UInt64: [UInt8]] = [:]
    var zeroed: Set<UInt64> = []
    var parentCID = "ffffffff"
    var createType = "streamOptimized"
    var flags: UInt32?
    /// Added to the LBA that a grain's marker states.
    var lbaError: UInt64 = 0

    /// Sector at which each grain lies in the result of `bytes()`.
    private(set) var places: [UInt64: UInt64] = [:]

    var descriptor: String {
        """
        # Disk DescriptorFile
        version=1
        CID=12345678
        parentCID=\(parentCID)
        createType="\(createType)"
        RW \(capacity) SPARSE "disk.vmdk"
        """
    }

    mutating func bytes() -> [UInt8] {
        let compressed = style != .sparse
        let tableCount = (capacity + grainSectors * 512 - 1) / (grainSectors * 512)
        let directorySectors = (tableCount * 4 + 511) / 512
        var out = [UInt8](repeating: 0, count: 512)
        out += pad(Array(descriptor.utf8), to: 1024)
        var tables = [[UInt32]](repeating: [UInt32](repeating: 0, count: 512), count: Int(tableCount))
        for grain in zeroed { tables[Int(grain / 512)][Int(grain % 512)] = 1 }
        let front = UInt64(out.count / 512)
        if style != .stream { out += [UInt8](repeating: 0, count: Int(directorySectors + tableCount * 4) * 512) }
        for grain in grains.keys.sorted() {
            let sector = UInt64(out.count / 512)
            places[grain] = sector
            tables[Int(grain / 512)][Int(grain % 512)] = UInt32(sector)
            let data = grains[grain] ?? []
            if compressed {
                let stream = storedZlib(data)
                out += pad(little(grain * grainSectors + lbaError) + little(UInt32(stream.count)) + stream, to: 512)
            } else {
                out += pad(data, to: Int(grainSectors) * 512)
            }
        }
        if style == .stream {
            var directory: [UInt32] = []
            for table in tables {
                let isUsed = table.contains { $0 != 0 }
                directory.append(isUsed ? UInt32(out.count / 512 + 1) : 0)
                if isUsed { out += marker(4, type: 1) + table.flatMap { little($0) } }
            }
            out += marker(directorySectors, type: 2)
            let place = UInt64(out.count / 512)
            out += pad(directory.flatMap { little($0) }, to: 512)
            out += marker(1, type: 3) + header(directory: place)
            out += [UInt8](repeating: 0, count: 512)
            out.replaceSubrange(0..<512, with: header(directory: .max))
        } else {
            let directory = (0..<tableCount).map { little(UInt32(front + directorySectors + $0 * 4)) }.flatMap { $0 }
            let index = Array(pad(directory, to: 512) + tables.joined().flatMap { little($0) })
            out.replaceSubrange(Int(front) * 512..<Int(front) * 512 + index.count, with: index)
            out.replaceSubrange(0..<512, with: header(directory: front))
        }
        return out
    }

    /// What the guest must see.
    var expected: [UInt8] {
        var disk = [UInt8](repeating: 0, count: Int(capacity) * 512)
        for (grain, data) in grains {
            let start = Int(grain * grainSectors) * 512
            let part = data.prefix(disk.count - start)
            disk.replaceSubrange(start..<start + part.count, with: part)
        }
        return disk
    }

    private func header(directory: UInt64) -> [UInt8] {
        let compressed = style != .sparse
        let tables = (capacity + grainSectors * 512 - 1) / (grainSectors * 512)
        let overhead = style == .stream ? 3 : 3 + (tables * 4 + 511) / 512 + tables * 4
        let flags = flags ?? (3 | (zeroed.isEmpty ? 0 : 4) | (compressed ? 0x30000 : 0))
        var bytes: [UInt8] = Array("KDMV".utf8) + little(compressed ? 3 : 1 as UInt32) + little(flags)
        bytes += little(capacity) + little(grainSectors) + little(1 as UInt64) + little(2 as UInt64)
        bytes += little(512 as UInt32) + little(0 as UInt64) + little(directory) + little(overhead)
        bytes += [0, 0x0A, 0x20, 0x0D, 0x0A] + little(compressed ? 1 : 0 as UInt16)
        return pad(bytes, to: 512)
    }

    private func marker(_ sectors: UInt64, type: UInt32) -> [UInt8] {
        pad(little(sectors) + little(0 as UInt32) + little(type), to: 512)
    }
}

func little<Integer: FixedWidthInteger>(_ value: Integer) -> [UInt8] {
    (0..<Integer.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> Integer($0 * 8)) }
}

private func pad(_ bytes: [UInt8], to unit: Int) -> [UInt8] {
    bytes + [UInt8](repeating: 0, count: (unit - bytes.count % unit) % unit)
}

/// A zlib stream of stored blocks (RFC 1950, RFC 1951 section 3.2.4).
private func storedZlib(_ data: [UInt8]) -> [UInt8] {
    var out: [UInt8] = [0x78, 0x01]
    var start = 0
    repeat {
        let count = min(65535, data.count - start)
        out += [start + count == data.count ? 1 : 0] + little(UInt16(count)) + little(~UInt16(count))
        out += data[start..<start + count]
        start += count
    } while start < data.count
    var a: UInt32 = 1
    var b: UInt32 = 0
    for byte in data {
        a = (a + UInt32(byte)) % 65521
        b = (b + a) % 65521
    }
    return out + little(b << 16 | a).reversed()
}
