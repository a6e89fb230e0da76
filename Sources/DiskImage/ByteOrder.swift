extension RawSpan {
    /// Bounds-checked, unaligned, little-endian.
    func littleEndian<Integer: FixedWidthInteger & BitwiseCopyable>(
        at offset: Int, as type: Integer.Type = Integer.self
    ) -> Integer {
        Integer(littleEndian: unsafeLoadUnaligned(fromByteOffset: offset, as: type))
    }
}

extension Array where Element == UInt8 {
    /// Bounds-checked, unaligned, little-endian.
    func littleEndian<Integer: FixedWidthInteger & BitwiseCopyable>(at offset: Int, as type: Integer.Type) -> Integer {
        span.bytes.littleEndian(at: offset, as: type)
    }

    mutating func storeBigEndian<Integer: FixedWidthInteger & BitwiseCopyable>(_ value: Integer, at offset: Int) {
        withUnsafeMutableBytes { $0.storeBytes(of: value.bigEndian, toByteOffset: offset, as: Integer.self) }
    }
}
