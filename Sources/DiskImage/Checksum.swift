import CDeflate

/// CRC-32 (IEEE 802.3, as in gzip).
package func crc32(_ bytes: UnsafeRawBufferPointer) -> UInt32 {
    libdeflate_crc32(0, bytes.baseAddress, bytes.count)
}
