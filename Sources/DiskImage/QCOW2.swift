/// QEMU's image format, version 3, written only (QEMU docs/interop/qcow2.txt). All numbers are big-endian.
///
/// The file consists of **clusters**, here of 64 KiB; other sizes change the numbers (`Geometry`). Guest cluster n is found through two levels: entry n / 8192 of the **L1
/// table** points to an **L2 table** (one cluster, 8192 entries, 512 MiB of guest), whose entry n % 8192 points to the
/// data; 0 means zeros. Bit 63 of both says 'reference count is exactly one', which is so for all but compressed
/// clusters; those (bit 62) begin at any byte and share host clusters. Every host cluster in use, metadata included, has
/// a 16-bit **reference count**, how many entries point into it, in a refcount block (one cluster, 32768 counts); the
/// **refcount table** points to the blocks.
///
/// Layout of a finished image: header (cluster 0) · data in the order it came · L2 tables · L1 table · refcount
/// blocks · refcount table. The header is written last: until then the file isn't a qcow2 image.
package enum QCOW2 {
    static let clusterSize = UInt64(Chunk.clusterSize)
    static let copied: UInt64 = 1 << 63
    static let headerLength = 104
    /// Bytes allocated ahead of the writers, who all wait for one another when that is done; what is left over goes back
    /// in `finish`.
    static let reserveStep: UInt64 = 512 << 20

    /// The header of an image without snapshots, backing file, encryption or optional features.
    static func header(
        capacity: UInt64, l1Entries: UInt64, l1Offset: UInt64, refcountOffset: UInt64, refcountClusters: UInt64,
        compression: Compression?, geometry: Geometry
    ) -> [UInt8] {
        // The zeros behind the 104 bytes are the end of the header extensions.
        var bytes = [UInt8](repeating: 0, count: Int(geometry.clusterSize))
        bytes.storeBigEndian(0x5146_49FB as UInt32, at: 0)
        bytes.storeBigEndian(3 as UInt32, at: 4)
        bytes.storeBigEndian(geometry.clusterBits, at: 20)
        bytes.storeBigEndian(capacity, at: 24)
        bytes.storeBigEndian(UInt32(l1Entries), at: 36)
        bytes.storeBigEndian(l1Offset, at: 40)
        bytes.storeBigEndian(refcountOffset, at: 48)
        bytes.storeBigEndian(UInt32(refcountClusters), at: 56)
        bytes.storeBigEndian(4 as UInt32, at: 96)  // refcount_order: 16 bits
        bytes.storeBigEndian(UInt32(headerLength), at: 100)
        if compression == .zstd {
            bytes.storeBigEndian(8 as UInt64, at: 72)  // incompatible feature bit 3: a compression type follows
            bytes.storeBigEndian(UInt32(headerLength + 8), at: 100)
            bytes[104] = 1
        }
        return bytes
    }

    /// The L2 entry of a compressed cluster: its byte in the file, and how many sectors it touches behind the first.
    static func compressedEntry(_ offset: UInt64, _ count: Int) -> UInt64 {
        let sectors = (offset + UInt64(count) - 1) / 512 - offset / 512
        return 1 << 62 | sectors << 54 | offset
    }
}
