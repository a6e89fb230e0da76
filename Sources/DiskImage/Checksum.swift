import CDeflate

/// CRC-32 (IEEE 802.3, as in gzip), continued from `start`.
package func crc32(_ bytes: UnsafeRawBufferPointer, _ start: UInt32 = 0) -> UInt32 {
    libdeflate_crc32(start, bytes.baseAddress, bytes.count)
}
