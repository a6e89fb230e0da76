import Glibc

/// Whether all of `bytes` are zero. The buffer is compared with itself one word further on, which libc does with the
/// widest vectors the CPU has and stops at the first difference.
package func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
    let word = MemoryLayout<UInt64>.size
    guard let base = bytes.baseAddress, bytes.count >= word else { return bytes.allSatisfy { $0 == 0 } }
    guard base.loadUnaligned(as: UInt64.self) == 0 else { return false }
    return memcmp(base, base + word, bytes.count - word) == 0
}

extension Chunk {
    /// Bit i is set when cluster i of the chunk in `bytes` holds a byte other than zero.
    package static func clusterBitmap(_ bytes: UnsafeRawBufferPointer) -> UInt64 {
        var bitmap: UInt64 = 0
        var start = 0
        while start < bytes.count {
            let end = min(start + clusterSize, bytes.count)
            if !isZero(UnsafeRawBufferPointer(rebasing: bytes[start..<end])) {
                bitmap |= 1 << UInt64(start / clusterSize)
            }
            start = end
        }
        return bitmap
    }
}
